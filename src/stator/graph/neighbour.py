"""Another namespace of the same control plane, for a process that looks into it and calls its instances.

It takes no lease there and registers nothing: to the other namespace it is a caller like any other, which says that
namespace in its handshakes and proves that namespace's token.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

from stator.discovery.base import Discovery
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph.token import TOKEN_KEY
from stator.runtime.context import CallContext
from stator.runtime.directory import InstanceDirectory
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Sink, StreamHandle, Target, TransportClient

logger = logging.getLogger(__name__)


class Neighbour:
    """A transport client of the other namespace, and its instances. Owns what it is given, from `start` to `close`.

    client: proves the token that this process has. with_token: makes a client for another one; given where namespaces
    keep their tokens in discovery, each its own: one that is found there counts.
    """

    def __init__(
        self,
        namespace: str,
        client: TransportClient,
        discovery: Discovery,
        with_token: Callable[[str], TransportClient] | None = None,
    ) -> None:
        self.namespace = namespace
        self.directory = InstanceDirectory(discovery)
        self._discovery = discovery
        self._client = client
        self._with_token = with_token
        self._token: str | None = None
        self._tasks = TaskOwner(f"neighbour {namespace}")

    async def start(self) -> None:
        """Begins to follow. A control plane that is away is waited for; one that lets us not look into the namespace
        is a ConfigError."""
        try:
            await self._discovery.get(TOKEN_KEY)
        except StatorError as error:
            if error.code is not ErrorCode.INSTANCE_LOST:
                raise ConfigError(f"namespace {self.namespace}: {error.message}") from None
        if self._with_token is None:
            await self.directory.start()
        else:
            self._tasks.spawn(self._follow_token(self._with_token), "follow the token")

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        return self._client.open(target, request, sink, context=context, item_type=item_type)

    async def close(self) -> None:
        await self._tasks.close()
        await self.directory.close()
        await self._discovery.close()
        await self._client.close()

    async def _follow_token(self, with_token: Callable[[str], TransportClient]) -> None:
        begun = False
        async with contextlib.aclosing(self._discovery.watch(TOKEN_KEY)) as batches:
            async for batch in batches:
                for entry in batch.puts:
                    if entry.key == TOKEN_KEY:
                        await self._use(entry.value.decode(), with_token)
                if not begun:
                    # Not before: whoever is seen may be called.
                    begun = True
                    await self.directory.start()

    async def _use(self, token: str, with_token: Callable[[str], TransportClient]) -> None:
        if token == self._token:
            return
        self._token = token
        # Streams under another token are of instances that no longer are.
        before, self._client = self._client, with_token(token)
        await before.close()
