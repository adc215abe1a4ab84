"""Every metric that Stator exports, declared once.

`Metrics` is a registry of its own (the library's global one is not used, so that several frontends can live in one
process). It is written to and rendered on one event loop and takes no locks of its own.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.instances import InstanceInfo
from stator.messages.reports import DECISION_S, DIFFERENCE_BLOCKS, PEER_DELAY_S, WAIT_S, RouterStats, WorkerReport
from stator.observability.stats import WorkerRates, worker_rates
from stator.runtime.context import loop_time

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
WITHOUT_ENGINE = frozenset({"router", "processor"})
"""Roles whose reports say nothing about an engine."""

OTHER = "other"
"""The label value for everything a caller could invent."""

RATE_WINDOW_S = 5.0


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """name without the `stator_` prefix; counters end in _total, units end the name."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_DURATION_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0)
_TOKENS = tuple(float(2**power) for power in range(18))

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_REQUEST = ("model", "endpoint")

FRONTEND_METRICS: tuple[MetricSpec, ...] = (
    MetricSpec(
        "requests_total",
        _C,
        "Requests by the HTTP status that fits how they ended: a stream that failed after its first token counts under "
        "its error's status, one that the client left under 499.",
        ("model", "endpoint", "code"),
    ),
    MetricSpec("request_duration_seconds", _H, "From the request's head to its end.", _REQUEST, _DURATION_S),
    MetricSpec("time_to_first_token_seconds", _H, "From the request's head to its first token.", _REQUEST, _TTFT_S),
    MetricSpec("inter_token_latency_seconds", _H, "Time between the tokens of one request.", _REQUEST, _ITL_S),
    MetricSpec("request_input_tokens", _H, "Prompt tokens of a finished request.", _REQUEST, _TOKENS),
    MetricSpec("request_output_tokens", _H, "Generated tokens of a finished request.", _REQUEST, _TOKENS),
    MetricSpec("request_cached_tokens", _H, "Prompt tokens found in a KV cache.", _REQUEST, _TOKENS),
    MetricSpec("client_disconnects_total", _C, "Clients that left before their answer was complete.", ("endpoint",)),
    MetricSpec("requests_in_progress", _G, "Requests that have not ended.", ("endpoint",)),
    MetricSpec("rejected_total", _C, "Requests turned away, by error code.", ("reason",)),
)

FRONTEND_PROCESS_UP = MetricSpec(
    "frontend_process_up",
    _G,
    "1 for each process of the frontend that answered this scrape. With several, all that the frontend itself "
    "counts is labelled by process.",
    ("process",),
)

_WORKER = ("worker", "service", "role", "host")

WORKER_METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("worker_info", _G, "1 for each worker, with the model that it serves.", (*_WORKER, "model")),
    MetricSpec("worker_running_requests", _G, "Sequences in the engine's batch.", _WORKER),
    MetricSpec("worker_waiting_requests", _G, "Sequences waiting for a place in the batch.", _WORKER),
    MetricSpec("worker_kv_blocks", _G, "KV blocks of the engine.", _WORKER),
    MetricSpec("worker_kv_blocks_used", _G, "KV blocks that sequences use or hold.", _WORKER),
    MetricSpec("worker_kv_blocks_held", _G, "KV blocks of finished prefills that wait to be fetched.", _WORKER),
    MetricSpec("worker_kv_usage_ratio", _G, "Used part of the KV blocks, 0 to 1.", _WORKER),
    MetricSpec("worker_prompt_tokens_total", _C, "Prompt tokens of scheduled requests.", _WORKER),
    MetricSpec("worker_prompt_tokens_cached_total", _C, "Prompt tokens found in the prefix cache.", _WORKER),
    MetricSpec("worker_prompt_tokens_computed_total", _C, "Prompt tokens computed here.", _WORKER),
    MetricSpec("worker_prompt_tokens_transferred_total", _C, "Prompt tokens fetched from a prefill worker.", _WORKER),
    MetricSpec("worker_generation_tokens_total", _C, "Tokens generated.", _WORKER),
    MetricSpec("worker_preemptions_total", _C, "Sequences put back to be recomputed.", _WORKER),
    MetricSpec(
        "worker_stalls_total",
        _C,
        "Engines that made no step while they had work, and were started again: of this worker's process and those "
        "that it took the place of.",
        _WORKER,
    ),
    MetricSpec("worker_prompt_throughput_tokens_per_second", _G, "Prompt tokens computed, recent average.", _WORKER),
    MetricSpec("worker_generation_throughput_tokens_per_second", _G, "Tokens generated, recent average.", _WORKER),
    MetricSpec("worker_prefix_hit_ratio", _G, "Recent prompt tokens found in the prefix cache, 0 to 1.", _WORKER),
    MetricSpec(
        "remote_prefill_total",
        _C,
        "Prefills by outcome. A decode worker's: remote, local, fallback (meant to be remote, computed locally after "
        "all). A prefill worker's: done, failed, refused (its KV blocks would not fit the decode worker's), unwanted "
        "(nobody waited for it any more).",
        (*_WORKER, "outcome"),
    ),
    MetricSpec(
        "worker_prefill_instances",
        _G,
        "Prefill instances that a decode worker sees, by pairing: paired (may prefill for it) or refused (block size, "
        "KV type, model, engine version or connector differ; /health says which).",
        (*_WORKER, "pairing"),
    ),
    MetricSpec("prefill_queue_size", _G, "Prefill jobs that nobody has taken: the most that any worker reports."),
)

_ROUTER = ("router",)

ROUTER_METRICS: tuple[MetricSpec, ...] = (
    MetricSpec("route_decisions_total", _C, "Decisions of a router, by mode.", (*_ROUTER, "mode")),
    MetricSpec("route_decision_seconds", _H, "Time that a decision took in the router.", _ROUTER, DECISION_S),
    MetricSpec("router_bookings", _G, "Requests that a router has sent to workers and that have not ended.", _ROUTER),
    MetricSpec("router_waiting_requests", _G, "Requests that wait at a router, because no worker has room.", _ROUTER),
    MetricSpec("router_waiting_tokens", _G, "Prompt tokens of the requests that wait at a router.", _ROUTER),
    MetricSpec("router_wait_seconds", _H, "How long a request waited at a router for room.", _ROUTER, WAIT_S),
    MetricSpec(
        "router_refusals_total",
        _C,
        "Requests that a router refused for want of room: queue_full, queue_wait (it waited, or would have to, longer "
        "than max-queue-wait) or deadline (longer than its own time left).",
        (*_ROUTER, "reason"),
    ),
    MetricSpec(
        "router_overlap_predictions_total",
        _C,
        "Predicted overlaps that were compared with the engine's cached tokens: exact, over (predicted more) or "
        "under. basis: events (of workers), booked (blocks that were being computed), unsettled (events interrupted).",
        (*_ROUTER, "outcome", "basis"),
    ),
    MetricSpec(
        "router_overlap_difference_blocks",
        _H,
        "Distance of a predicted overlap from what the engine had cached, in blocks.",
        _ROUTER,
        DIFFERENCE_BLOCKS,
    ),
    MetricSpec("router_index_blocks", _G, "Block hashes in a router's prefix index.", _ROUTER),
    MetricSpec("router_index_bytes", _G, "Memory of a router's prefix index, estimated.", _ROUTER),
    MetricSpec("router_index_workers", _G, "Workers whose KV events a router follows.", _ROUTER),
    MetricSpec("router_index_settled_workers", _G, "Those of them whose view is up to date.", _ROUTER),
    MetricSpec("router_index_gaps_total", _C, "Event streams with a loss, which were read anew.", _ROUTER),
    MetricSpec("router_peers", _G, "Other routers whose bookings a router follows.", _ROUTER),
    MetricSpec("router_peer_bookings", _G, "Requests of other routers that a router counts.", _ROUTER),
    MetricSpec(
        "router_peer_lag_seconds",
        _G,
        "How old at most what a router knows of other routers' bookings is; 1 for a second or more.",
        _ROUTER,
    ),
    MetricSpec("router_peer_resyncs_total", _C, "Streams of other routers' bookings that were read anew.", _ROUTER),
    MetricSpec(
        "router_peer_delay_seconds", _H, "How late a router knew of other routers' bookings.", _ROUTER, PEER_DELAY_S
    ),
)

PREFILL_OUTCOMES = frozenset({"remote", "local", "fallback", "done", "failed", "refused", "unwanted"})
PAIRINGS = frozenset({"paired", "refused"})
REFUSALS = frozenset({"queue_full", "queue_wait", "deadline"})


class Tally:
    """The observations of one series of a histogram, without prometheus_client's locks and linear search."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.buckets, value)] += times
        self.total += value * times


class TalliedHistogram(Collector):
    def __init__(self, spec: MetricSpec) -> None:
        self._spec = spec
        self._series: dict[tuple[str, ...], Tally] = {}

    def of(self, labels: tuple[str, ...]) -> Tally:
        """The series of these labels, which is there from now on. Raises ValueError for another number of labels."""
        tally = self._series.get(labels)
        if tally is None:
            if len(labels) != len(self._spec.labels):
                raise ValueError(f"{self._spec.name} has the labels {self._spec.labels}, not {labels}")
            tally = self._series[labels] = Tally(self._spec.buckets)
        return tally

    def take(self, labels: tuple[str, ...], counts: Sequence[int], total: float) -> None:
        """Counts made elsewhere, of a peer's message: ignored if they do not fit the buckets."""
        if len(counts) == len(self._spec.buckets) + 1:
            tally = self.of(labels)
            tally.counts = [have + more for have, more in zip(tally.counts, counts, strict=True)]
            tally.total += total

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(f"stator_{self._spec.name}", self._spec.help, labels=self._spec.labels)
        for labels, tally in self._series.items():
            family.add_metric(labels, self._cumulative(tally), tally.total)
        yield family

    def _cumulative(self, tally: Tally) -> list[tuple[str, float]]:
        bounds = [*(repr(bound) for bound in self._spec.buckets), "+Inf"]
        buckets: list[tuple[str, float]] = []
        running = 0
        for bound, count in zip(bounds, tally.counts, strict=True):
            running += count
            buckets.append((bound, running))
        return buckets


@dataclass(slots=True)
class _Worker:
    labels: tuple[str, ...]
    model: str
    report: WorkerReport
    readings: deque[tuple[float, EngineLoad]] = field(default_factory=lambda: deque[tuple[float, EngineLoad]]())

    def rates(self) -> WorkerRates:
        (then, before), (now, after) = self.readings[0], self.readings[-1]
        return worker_rates(before, after, now - then)


class WorkerCollector(Collector):
    """The latest figures of each living worker. A worker that leaves takes its series along.

    clock: monotonic seconds; the running loop's by default.
    """

    def __init__(self, clock: Callable[[], float] = loop_time) -> None:
        self._clock = clock
        self._workers: dict[InstanceId, _Worker] = {}
        self._routers: dict[InstanceId, RouterStats] = {}

    def update(self, instance: InstanceInfo, report: WorkerReport) -> None:
        """Throughputs are averages over the last RATE_WINDOW_S."""
        if report.router is not None:
            self._routers[instance.instance_id] = report.router
        if instance.role in WITHOUT_ENGINE:
            return
        now = self._clock()
        worker = self._workers.get(instance.instance_id)
        if worker is None:
            labels = (instance.instance_id, instance.service, instance.role, instance.host)
            worker = self._workers[instance.instance_id] = _Worker(labels, instance.model or "", report)
        worker.report = report
        worker.readings.append((now, report.load))
        while len(worker.readings) > 2 and worker.readings[1][0] <= now - RATE_WINDOW_S:
            worker.readings.popleft()

    def remove(self, instance_id: InstanceId) -> None:
        self._workers.pop(instance_id, None)
        self._routers.pop(instance_id, None)

    def collect(self) -> Iterable[Metric]:
        families = {spec.name: _family(spec) for spec in WORKER_METRICS}
        for worker in self._workers.values():
            families["worker_info"].add_metric((*worker.labels, worker.model), 1)
            for name, value in _values(worker.report.load, worker.rates()).items():
                families[name].add_metric(worker.labels, value)
            families["worker_stalls_total"].add_metric(worker.labels, worker.report.stalls_total)
            for outcome, count in _known(worker.report.prefills, PREFILL_OUTCOMES).items():
                families["remote_prefill_total"].add_metric((*worker.labels, outcome), count)
            for pairing, count in _known(worker.report.prefill_instances, PAIRINGS).items():
                families["worker_prefill_instances"].add_metric((*worker.labels, pairing), count)
        waiting = max((worker.report.queue_waiting for worker in self._workers.values()), default=0)
        families["prefill_queue_size"].add_metric((), waiting)
        yield from families.values()
        yield from router_families(self._routers)


def router_families(routers: Mapping[InstanceId, RouterStats]) -> Iterable[Metric]:
    plain = {spec.name: _family(spec) for spec in ROUTER_METRICS if spec.kind is not Kind.HISTOGRAM}
    tallied = {spec.name: TalliedHistogram(spec) for spec in ROUTER_METRICS if spec.kind is Kind.HISTOGRAM}
    for router, stats in routers.items():
        for mode, count in stats.decisions.items():
            plain["route_decisions_total"].add_metric((router, mode), count)
        for outcome, by_basis in stats.predictions.items():
            for basis, count in by_basis.items():
                plain["router_overlap_predictions_total"].add_metric((router, outcome, basis), count)
        plain["router_bookings"].add_metric((router,), stats.num_bookings)
        plain["router_waiting_requests"].add_metric((router,), stats.num_waiting)
        plain["router_waiting_tokens"].add_metric((router,), stats.num_waiting_tokens)
        for reason, count in _known(stats.refusals, REFUSALS).items():
            plain["router_refusals_total"].add_metric((router, reason), count)
        if stats.index is not None:
            plain["router_index_blocks"].add_metric((router,), stats.index.num_entries)
            plain["router_index_bytes"].add_metric((router,), stats.index.num_bytes)
            plain["router_index_workers"].add_metric((router,), stats.index.num_workers)
            plain["router_index_settled_workers"].add_metric((router,), stats.index.num_settled)
            plain["router_index_gaps_total"].add_metric((router,), stats.index.gaps_total)
        if (peers := stats.peers) is not None:
            plain["router_peers"].add_metric((router,), peers.num_peers)
            plain["router_peer_bookings"].add_metric((router,), peers.num_bookings)
            plain["router_peer_lag_seconds"].add_metric((router,), peers.lag_s)
            plain["router_peer_resyncs_total"].add_metric((router,), peers.resyncs_total)
            tallied["router_peer_delay_seconds"].take((router,), peers.delay_counts, peers.delay_sum_s)
        tallied["route_decision_seconds"].take((router,), stats.decision_counts, stats.decision_sum_s)
        tallied["router_wait_seconds"].take((router,), stats.wait_counts, stats.wait_sum_s)
        tallied["router_overlap_difference_blocks"].take((router,), stats.difference_counts, stats.difference_sum)
    yield from plain.values()
    for histogram in tallied.values():
        yield from histogram.collect()


def _family(spec: MetricSpec) -> CounterMetricFamily | GaugeMetricFamily:
    family = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
    return family(f"stator_{spec.name}", spec.help, labels=spec.labels)


def _known(reported: Mapping[str, int], labels: frozenset[str]) -> dict[str, int]:
    """Counts by label; those under labels that are not known here are summed up."""
    counts: dict[str, int] = {}
    for name, count in reported.items():
        label = name if name in labels else OTHER
        counts[label] = counts.get(label, 0) + count
    return counts


def _values(load: EngineLoad, rates: WorkerRates) -> dict[str, float]:
    return {
        "worker_running_requests": load.num_running,
        "worker_waiting_requests": load.num_waiting,
        "worker_kv_blocks": load.num_blocks,
        "worker_kv_blocks_used": load.num_blocks_used,
        "worker_kv_blocks_held": load.num_blocks_held,
        "worker_kv_usage_ratio": rates.kv_usage,
        "worker_prompt_tokens_total": load.prompt_tokens_total,
        "worker_prompt_tokens_cached_total": load.prompt_tokens_cached_total,
        "worker_prompt_tokens_computed_total": load.prompt_tokens_computed_total,
        "worker_prompt_tokens_transferred_total": load.prompt_tokens_transferred_total,
        "worker_generation_tokens_total": load.generation_tokens_total,
        "worker_preemptions_total": load.preemptions_total,
        "worker_prompt_throughput_tokens_per_second": rates.prompt_tokens_per_s,
        "worker_generation_throughput_tokens_per_second": rates.generation_tokens_per_s,
        "worker_prefix_hit_ratio": rates.prefix_hit_rate,
    }


class Metrics:
    """One process's metrics. Children are cached here: asking for one on a hot path is a dictionary look-up."""

    def __init__(self, clock: Callable[[], float] = loop_time) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.workers = WorkerCollector(clock)
        self.registry.register(self.workers)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, TalliedHistogram] = {}
        self._counter_children: dict[tuple[str, ...], Counter] = {}
        self._gauge_children: dict[tuple[str, ...], Gauge] = {}
        for spec in FRONTEND_METRICS:
            self._declare(spec)

    def _declare(self, spec: MetricSpec) -> None:
        name = f"stator_{spec.name}"
        match spec.kind:
            case Kind.COUNTER:
                self._counters[spec.name] = Counter(name, spec.help, spec.labels, registry=self.registry)
            case Kind.GAUGE:
                self._gauges[spec.name] = Gauge(name, spec.help, spec.labels, registry=self.registry)
            case Kind.HISTOGRAM:
                histogram = self._histograms[spec.name] = TalliedHistogram(spec)
                self.registry.register(histogram)

    def counter(self, name: str, *labels: str) -> Counter:
        """labels: values in the order of the table. Raises KeyError for a name that the table lacks."""
        child = self._counter_children.get((name, *labels))
        if child is None:
            family = self._counters[name]
            child = self._counter_children[name, *labels] = family.labels(*labels) if labels else family
        return child

    def gauge(self, name: str, *labels: str) -> Gauge:
        child = self._gauge_children.get((name, *labels))
        if child is None:
            family = self._gauges[name]
            child = self._gauge_children[name, *labels] = family.labels(*labels) if labels else family
        return child

    def histogram(self, name: str, *labels: str) -> Tally:
        return self._histograms[name].of(labels)

    def render(self) -> bytes:
        """The exposition text, of content type CONTENT_TYPE."""
        return generate_latest(self.registry)
