"""What a worker tells whoever watches it, once a second."""

import msgspec

from stator.messages.engine import EngineLoad


class ReportRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Subscribes to a worker's reports: one now, then one every interval_s, until cancelled."""

    interval_s: float = 1.0


class WorkerReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """load: the engine's reading. prefills: counts by outcome, of a decode worker `local`, `remote` and `fallback`
    (meant to be remote, computed here after all), of a prefill worker `done`, `failed` and `unwanted`.
    queue_waiting: jobs waiting in the prefill queue as this worker sees it.
    """

    load: EngineLoad
    prefills: dict[str, int] = {}
    queue_waiting: int = 0
