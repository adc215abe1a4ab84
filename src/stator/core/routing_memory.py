"""What a router remembers of requests that are over: how long outputs are, and where sessions were. Pure, bounded."""

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from statistics import median_low

from stator.ids import InstanceId

NUM_LENGTHS = 256
REFRESH_EVERY = 16
MIN_LENGTHS = 8
UNKNOWN_OUTPUT_TOKENS = 256
"""Expected output, capped by max_tokens, until a model's requests have shown theirs."""

MAX_MODELS = 256
MAX_SESSIONS = 16_384


@dataclass(slots=True)
class _Lengths:
    last: deque[int] = field(default_factory=lambda: deque[int](maxlen=NUM_LENGTHS))
    num_new: int = 0
    median: int | None = None


class OutputLengths:
    """A running median per model, of the last NUM_LENGTHS outputs."""

    def __init__(self) -> None:
        self._by_model: dict[str, _Lengths] = {}

    def add(self, model: str, num_output_tokens: int) -> None:
        lengths = self._by_model.get(model)
        if lengths is None:
            if len(self._by_model) >= MAX_MODELS:
                return
            lengths = self._by_model[model] = _Lengths()
        lengths.last.append(num_output_tokens)
        lengths.num_new += 1
        if lengths.num_new >= REFRESH_EVERY or (lengths.median is None and len(lengths.last) >= MIN_LENGTHS):
            lengths.num_new = 0
            lengths.median = median_low(lengths.last)

    def expected(self, model: str, max_tokens: int) -> int:
        """At least 1, at most max_tokens."""
        lengths = self._by_model.get(model)
        known = lengths.median if lengths is not None else None
        return max(1, min(max_tokens, UNKNOWN_OUTPUT_TOKENS if known is None else known))


class Sessions:
    """The last instance of each session, of the MAX_SESSIONS that were used last."""

    def __init__(self, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        self._instances: OrderedDict[str, InstanceId] = OrderedDict()

    def put(self, session_id: str, instance_id: InstanceId) -> None:
        self._instances[session_id] = instance_id
        self._instances.move_to_end(session_id)
        while len(self._instances) > self._max_sessions:
            self._instances.popitem(last=False)

    def get(self, session_id: str) -> InstanceId | None:
        return self._instances.get(session_id)
