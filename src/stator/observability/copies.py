"""The metrics of several processes as one exposition: each series says of which process it is.

A label, not a sum: a process that starts again begins its counters at zero, and one that did not answer in time is
missing from a scrape. Prometheus knows what either means for a single series; a sum would fall and rise again, and be
taken for traffic.
"""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from stator.messages.metrics import MetricFamily, MetricSample, MetricsSnapshot
from stator.observability.metrics import FRONTEND_METRICS, FRONTEND_PROCESS_UP, Metrics

PROCESS_LABEL = "process"

_NAMES = frozenset(f"stator_{spec.name.removesuffix('_total')}" for spec in FRONTEND_METRICS)


def snapshot_of(metrics: Metrics, process: int) -> MetricsSnapshot:
    """What this process itself counted; the workers' figures are not part of it, every process has them."""
    families = [
        MetricFamily(
            metric.name,
            metric.documentation,
            metric.type,
            [MetricSample(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
        )
        for metric in metrics.registry.collect()
        if metric.name in _NAMES
    ]
    return MetricsSnapshot(process, families)


def render_together(metrics: Metrics, snapshots: Mapping[int, MetricsSnapshot | None]) -> bytes:
    """metrics: of this process, for the workers' figures. snapshots: by process, None for one that did not answer."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families([*metrics.workers.collect(), *_merged(snapshots), _up(snapshots)]))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _merged(snapshots: Mapping[int, MetricsSnapshot | None]) -> Iterator[Metric]:
    merged: dict[str, Metric] = {}
    for process, snapshot in snapshots.items():
        for family in snapshot.families if snapshot is not None else ():
            metric = merged.get(family.name)
            if metric is None:
                metric = merged[family.name] = Metric(family.name, family.help, family.kind)
            for sample in family.samples:
                metric.add_sample(sample.name, {PROCESS_LABEL: str(process), **sample.labels}, sample.value)
    yield from merged.values()


def _up(snapshots: Mapping[int, MetricsSnapshot | None]) -> Metric:
    up = GaugeMetricFamily(f"stator_{FRONTEND_PROCESS_UP.name}", FRONTEND_PROCESS_UP.help, labels=[PROCESS_LABEL])
    for process, snapshot in sorted(snapshots.items()):
        up.add_metric([str(process)], float(snapshot is not None))
    return up
