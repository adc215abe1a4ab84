"""Thin shells around engines: the decode worker and the prefill worker."""

from stator.worker.decode import DecodeWorker
from stator.worker.host import WorkerHost
from stator.worker.prefill import PrefillWorker
from stator.worker.reporting import Reporter

__all__ = ["DecodeWorker", "PrefillWorker", "Reporter", "WorkerHost"]
