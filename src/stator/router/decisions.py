"""The last decisions of a router: found by booking while observations come in, and by request id by who asks why."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from stator.core.routing import Choice
from stator.ids import RequestId
from stator.messages.processor import RouteRequest
from stator.messages.routing import DecisionRecord

MAX_DECISIONS = 4096


@dataclass(slots=True)
class Decided:
    """A decision and what came of it.

    basis: what the predicted overlap rested on; "" if nothing was predicted.
    """

    booking: int
    request_id: RequestId
    time: float
    model: str
    num_prompt_tokens: int
    in_session: bool
    choice: Choice
    num_prompt_blocks: int
    block_size: int
    basis: str
    cached_tokens: int | None = None
    overlap_difference: int | None = None
    output_tokens: int | None = None
    failed: bool = False

    def record(self) -> DecisionRecord:
        choice = self.choice
        return DecisionRecord(
            request_id=self.request_id,
            time=self.time,
            model=self.model,
            mode=choice.mode.value,
            winner=choice.winner,
            num_prompt_tokens=self.num_prompt_tokens,
            num_prompt_blocks=self.num_prompt_blocks,
            num_candidates=choice.num_candidates,
            candidates=choice.candidates(),
            expected_output_tokens=choice.expected_output_tokens,
            session=self.in_session,
            cached_tokens=self.cached_tokens,
            overlap_difference=self.overlap_difference,
            output_tokens=self.output_tokens,
            failed=self.failed,
        )


class DecisionLog:
    """Keeps the last max_decisions."""

    def __init__(self, max_decisions: int = MAX_DECISIONS) -> None:
        self._max_decisions = max_decisions
        self._order: deque[Decided] = deque()
        self._by_booking: dict[int, Decided] = {}
        self._by_request: dict[RequestId, list[Decided]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def add(
        self, request_id: RequestId, time: float, request: RouteRequest, choice: Choice, block_size: int, basis: str
    ) -> None:
        decided = Decided(
            booking=choice.booking,
            request_id=request_id,
            time=time,
            model=request.model,
            num_prompt_tokens=request.num_prompt_tokens,
            in_session=request.session_id is not None,
            choice=choice,
            num_prompt_blocks=len(request.block_hashes),
            block_size=block_size,
            basis=basis,
        )
        self._order.append(decided)
        self._by_booking[decided.booking] = decided
        self._by_request.setdefault(request_id, []).append(decided)
        if len(self._order) > self._max_decisions:
            self._drop(self._order.popleft())

    def by_booking(self, booking: int) -> Decided | None:
        return self._by_booking.get(booking)

    def records(self, request_id: RequestId | None, limit: int) -> Iterator[DecisionRecord]:
        """The newest first; of one request, or of all."""
        decided = self._order if request_id is None else self._by_request.get(request_id, [])
        for one, _ in zip(reversed(decided), range(limit), strict=False):
            yield one.record()

    def _drop(self, decided: Decided) -> None:
        del self._by_booking[decided.booking]
        same = self._by_request[decided.request_id]
        same.remove(decided)
        if not same:
            del self._by_request[decided.request_id]
