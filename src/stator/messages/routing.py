"""What Processor and Router tell each other about a decision: how the request went, and why it went there."""

import msgspec

from stator.ids import InstanceId, RequestId


class RouteObservation(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """What became of a decision. One or several per booking, each with what is new.

    booking: `RouteDecision.booking`. num_cached_tokens: with the first token, as in TokenDelta. fetched: some of the
    prompt came from a prefill worker, so that the count says nothing about this worker's own cache.
    num_total_tokens: prompt tokens and those resumed. num_output_tokens: at the end of the request.
    failed: it ended on this instance before its first token.
    """

    booking: int
    num_cached_tokens: int | None = None
    fetched: bool = False
    num_total_tokens: int = 0
    num_output_tokens: int | None = None
    failed: bool = False


class RouteObservations(msgspec.Struct, frozen=True):
    """Request of the Router's `observe` endpoint, which answers with no item."""

    observations: list[RouteObservation]


class CandidateTerms(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a candidate cost what it did; milliseconds unless said. `total_ms` is the sum of the other terms.

    overlap_blocks: leading prompt blocks that it holds, by its own events. booked_blocks: those that it will hold,
    because a request that has them was sent there just before. trust: 0 to 1, by how much the overlap was scaled.
    queue_ms: work ahead. prefill_ms: the uncached part of the prompt. decode_ms: all output tokens. harm_ms: delay of
    the streams it runs. affinity_ms: negative for the session's last instance.
    num_streams: requests there; load: the share of its capacity that they are.
    """

    instance_id: InstanceId
    total_ms: float
    overlap_blocks: int = 0
    booked_blocks: int = 0
    trust: float = 1.0
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    harm_ms: float = 0.0
    affinity_ms: float = 0.0
    num_streams: int = 0
    load: float = 0.0


class DecisionRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision of a router, with what came of it as far as it is known.

    time: Unix seconds. candidates: the cheapest first, the winner always among them; at most as many as are kept.
    num_candidates: how many there were. expected_output_tokens: what the decode term was computed for.
    cached_tokens, overlap_difference: what the engine found in its cache, and how many blocks that is more (negative:
    fewer) than predicted; None until its first token, and for prompts that were fetched from a prefill worker.
    """

    request_id: RequestId
    time: float
    model: str
    mode: str
    winner: InstanceId
    num_prompt_tokens: int
    num_prompt_blocks: int
    num_candidates: int
    candidates: list[CandidateTerms]
    expected_output_tokens: int = 0
    session: bool = False
    cached_tokens: int | None = None
    overlap_difference: int | None = None
    output_tokens: int | None = None
    failed: bool = False


BOOKINGS_ENDPOINT = "bookings"


class BookingsRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Request of a Router's `bookings` endpoint, from another router: its bookings and every change of them, as
    BookingChanges, until cancelled. probe: one empty item and the end, to measure the way there and back."""

    probe: bool = False


class PeerBooking(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """A request that a router has sent to a worker and that has not ended. Milliseconds as that router predicts them.

    prefill_ms: of the uncached part. work_ms: all that the request takes of the worker. kv_tokens: prompt and half the
    expected output. block_hashes: of its prompt, the leading ones, which the worker will hold expected_ms from its
    booking on, if it has not said so by then. age_ms: since it was booked. started: its first token has come.
    """

    number: int
    instance_id: InstanceId
    prefill_ms: float
    work_ms: float
    kv_tokens: float
    prompt_tokens: int
    block_hashes: list[int] = []
    expected_ms: float = 0.0
    session_id: str | None = None
    age_ms: float = 0.0
    started: bool = False


class BookingChanges(msgspec.Struct, frozen=True, omit_defaults=True):
    """What has changed in a router's bookings since its last item; `core.peer_bookings` has the rules.

    sequence: one more with each item. at_ms: when the oldest of the changes happened, on the sender's clock.
    num_open: bookings after this item. booked: new ones. started, failed, ended: numbers of bookings. part: of the
    whole state, with the sequence of the last item before it; reset: the first part.
    """

    sequence: int = 0
    at_ms: float = 0.0
    num_open: int = 0
    booked: list[PeerBooking] = []
    started: list[int] = []
    failed: list[int] = []
    ended: list[int] = []
    reset: bool = False
    part: bool = False


class DecisionsRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Request of the Router's `decisions` endpoint; items are DecisionRecord, the newest first.

    request_id: only those of one request, one for each instance it was sent to. limit: at most so many.
    """

    request_id: RequestId | None = None
    limit: int = 100
