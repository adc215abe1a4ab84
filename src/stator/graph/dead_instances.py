"""Ends the leases of processes that died without a word, so that others need not wait for their time to pass.

The supervisor knows of the end of its own processes at once, the hub only when a lease was not renewed.
"""

import logging
from collections.abc import Sequence

from stator.discovery.base import Discovery
from stator.errors import StatorError
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)


class DeadInstances:
    """discovery: the caller's. Does nothing for those that gave their lease back themselves."""

    def __init__(self, discovery: Discovery) -> None:
        self._discovery = discovery
        self._tasks = TaskOwner("dead instances")

    def bury(self, keys: Sequence[str]) -> None:
        """keys: in discovery, of instances whose process has ended."""
        self._tasks.spawn(self._bury(tuple(keys)), f"end the lease of {keys[0]}")

    async def _bury(self, keys: Sequence[str]) -> None:
        try:
            for key in keys:
                found = await self._discovery.get(key)
                if found is not None and found.lease_id is not None:
                    await self._discovery.end_lease(found.lease_id)
        except StatorError as error:
            # It ends by itself, a little later.
            logger.info("could not end the lease of %s: %s", ", ".join(keys), error.message)

    async def close(self) -> None:
        await self._tasks.close()
