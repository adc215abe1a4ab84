"""What a worker, or a router, tells whoever watches it, once a second."""

import msgspec

from stator.messages.engine import EngineLoad


class ReportRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Subscribes to a worker's reports: one now, then one every interval_s, until cancelled."""

    interval_s: float = 1.0


class IndexStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """A router's prefix index. num_entries: block hashes; num_bytes: its memory, estimated. gaps_total: event streams
    that lost something and were read anew. num_workers, num_settled: followed, and those whose view is up to date.
    """

    num_entries: int = 0
    num_bytes: int = 0
    num_workers: int = 0
    num_settled: int = 0
    gaps_total: int = 0


class PeerStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Other routers of the deployment. num_bookings: of theirs, that count here. lag_s: of the slowest one's view, at
    most a second. resyncs_total: streams that were lost or had a gap, and were read anew. delay_counts: items with
    changes by how late they were known here, by PEER_DELAY_S; delay_sum_s belongs to them.
    """

    num_peers: int = 0
    num_bookings: int = 0
    lag_s: float = 0.0
    resyncs_total: int = 0
    delay_counts: list[int] = []
    delay_sum_s: float = 0.0


class RouterStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a router counted since its start.

    decisions: by mode. predictions: compared overlaps, by (outcome, basis): outcome `exact`, `over`, `under`; basis
    `events` when the prediction rested on workers' events alone, `booked` when blocks being computed were part of it.
    difference_counts: predictions by |difference| in blocks, one more than DIFFERENCE_BLOCKS, the last for what is
    above; decision_counts: decisions by seconds, by DECISION_S alike; wait_counts: how long
    those waited for room, by WAIT_S alike. The sums belong to them. num_waiting, num_waiting_tokens: requests that wait
    for room now, and their prompt tokens. refusals: of requests for which there was no room, by reason. peers:
    None for a router that has none to do with.
    """

    decisions: dict[str, int] = {}
    predictions: dict[str, dict[str, int]] = {}
    difference_counts: list[int] = []
    difference_sum: float = 0.0
    decision_counts: list[int] = []
    decision_sum_s: float = 0.0
    num_bookings: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    wait_counts: list[int] = []
    wait_sum_s: float = 0.0
    refusals: dict[str, int] = {}
    index: IndexStats | None = None
    peers: PeerStats | None = None


DIFFERENCE_BLOCKS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0)
WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PEER_DELAY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DECISION_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)


class WorkerReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """load: the engine's reading. prefills: counts by outcome, of a decode worker `local`, `remote` and `fallback`
    (meant to be remote, computed here after all), of a prefill worker `done`, `failed`, `refused` (made
    for an engine of another pairing) and `unwanted`.
    queue_waiting: jobs waiting in the prefill queue as this worker sees it. router: of an instance that routes.
    prefill_instances: of a decode worker that may use them, how many are `paired` with it and how many `refused`.
    stalls_total: engines of this worker's process and its predecessors that made no progress.
    """

    load: EngineLoad
    prefills: dict[str, int] = {}
    queue_waiting: int = 0
    router: RouterStats | None = None
    prefill_instances: dict[str, int] = {}
    stalls_total: int = 0
