"""Responses that may be fetched or continued: kept in the frontend's memory, while there is room for them.

Each process of a frontend keeps those that it made, and asks the others for what it has not got. A response is gone
with its process.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from uuid import uuid4

from stator.errors import StatorError
from stator.frontend.settings import FrontendSettings
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.messages.responses import ResponseFound, ResponseLookup, StoredResponse
from stator.runtime.context import CallContext
from stator.runtime.directory import InstanceDirectory
from stator.transport import calls
from stator.transport.base import Call, Target, TransportClient

logger = logging.getLogger(__name__)

ENDPOINT = "responses"
ANSWER_TIMEOUT_S = 2.0
OVERHEAD_BYTES = 512
"""Of one response, beside its bytes."""


class ResponseStore:
    """Bounded by number, bytes and age; the oldest leave first. What several responses share is counted once.

    clock: seconds; monotonic.
    """

    def __init__(
        self,
        *,
        max_responses: int,
        max_bytes: int,
        max_age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._kept: dict[str, tuple[float, StoredResponse]] = {}
        self._shares: dict[int, int] = {}
        """By the identity of a turn's bytes, which live as long as an entry here: how many responses have it."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, response: StoredResponse) -> None:
        self.remove(response.id)
        self._kept[response.id] = (self._clock(), response)
        self.num_bytes += _own_bytes(response)
        for turn in response.turns:
            shares = self._shares.get(id(turn), 0)
            self._shares[id(turn)] = shares + 1
            self.num_bytes += 0 if shares else len(turn)
        self._shrink()

    def get(self, response_id: str) -> StoredResponse | None:
        self._shrink()
        found = self._kept.get(response_id)
        return None if found is None else found[1]

    def remove(self, response_id: str) -> StoredResponse | None:
        """The response, if it was kept."""
        found = self._kept.pop(response_id, None)
        if found is None:
            return None
        response = found[1]
        self.num_bytes -= _own_bytes(response)
        for turn in response.turns:
            self._shares[id(turn)] -= 1
            if not self._shares[id(turn)]:
                del self._shares[id(turn)]
                self.num_bytes -= len(turn)
        return response

    def _shrink(self) -> None:
        expired = self._clock() - self._max_age_s
        while self._kept:
            oldest = next(iter(self._kept))
            too_many = len(self._kept) > self._max_responses or self.num_bytes > self._max_bytes
            if not too_many and self._kept[oldest][0] > expired:
                return
            self.remove(oldest)


def _own_bytes(response: StoredResponse) -> int:
    return len(response.body) + OVERHEAD_BYTES + 8 * len(response.turns)


class ResponseKeeper:
    """The store of one process alone."""

    def __init__(self, settings: FrontendSettings | None = None) -> None:
        bounds = settings if settings is not None else FrontendSettings()
        self.store = ResponseStore(
            max_responses=bounds.max_stored_responses,
            max_bytes=bounds.max_stored_bytes,
            max_age_s=bounds.max_stored_age_s,
        )

    def keep(self, response: StoredResponse) -> None:
        self.store.keep(response)

    async def find(self, response_id: str) -> StoredResponse | None:
        return self.store.get(response_id)

    async def remove(self, response_id: str) -> bool:
        """Whether it was kept."""
        return self.store.remove(response_id) is not None


class SharedResponseKeeper(ResponseKeeper):
    """The stores of all frontends of a deployment: what is not in ours is asked of the others, all at once.

    A frontend that does not answer within ANSWER_TIMEOUT_S counts as one that has nothing.
    """

    def __init__(
        self,
        *,
        instance_id: InstanceId,
        client: TransportClient,
        directory: InstanceDirectory,
        settings: FrontendSettings | None = None,
    ) -> None:
        super().__init__(settings)
        self._instance_id = instance_id
        self._client = client
        self._directory = directory

    def answer(self, call: Call) -> None:
        """Endpoint `responses`: what this process itself keeps."""
        lookup: ResponseLookup = call.request
        found = self.store.remove(lookup.id) if lookup.remove else self.store.get(lookup.id)
        call.items([ResponseFound(found)])
        call.end()

    async def find(self, response_id: str) -> StoredResponse | None:
        found = await super().find(response_id)
        return found if found is not None else await self._elsewhere(ResponseLookup(response_id))

    async def remove(self, response_id: str) -> bool:
        if await super().remove(response_id):
            return True
        return await self._elsewhere(ResponseLookup(response_id, remove=True)) is not None

    async def _elsewhere(self, lookup: ResponseLookup) -> StoredResponse | None:
        others = [
            info
            for info in self._directory.instances(ready_only=False)
            if info.instance_id != self._instance_id and info.role == "frontend" and ENDPOINT in info.endpoints
        ]
        asked = [asyncio.ensure_future(self._ask(info, lookup)) for info in others]
        try:
            for answer in asyncio.as_completed(asked):
                if (found := await answer) is not None:
                    return found
            return None
        finally:
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, info: InstanceInfo, lookup: ResponseLookup) -> StoredResponse | None:
        target = Target(info.addresses, ENDPOINT, info.instance_id)
        context = CallContext(RequestId(f"responses/{uuid4().hex}"))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                found: ResponseFound = await calls.call(
                    self._client, target, lookup, context=context, item_type=ResponseFound
                )
        except (StatorError, TimeoutError) as error:
            logger.warning(
                "%s did not say whether it has a response: %s", info.instance_id, error or "no answer in time"
            )
            return None
        return found.response
