"""What a frontend process tells the other processes of its frontend, so that any of them can show the whole."""

import msgspec


class SnapshotRequest(msgspec.Struct, frozen=True):
    """Asks for a process's own metrics, once."""


class MetricSample(msgspec.Struct, frozen=True, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class MetricFamily(msgspec.Struct, frozen=True, array_like=True):
    """name without a counter's `_total`. kind: counter, gauge or histogram."""

    name: str
    help: str
    kind: str
    samples: list[MetricSample]


class MetricsSnapshot(msgspec.Struct, frozen=True):
    """process: which of the copies, from 1."""

    process: int
    families: list[MetricFamily]
