"""Thin shells around engines: the decode worker and the prefill worker."""

from stator.worker.adapters import WorkerAdapters
from stator.worker.decode import DecodeWorker, disagg_policy, prefill_queue
from stator.worker.engine import make_engine, start_engine
from stator.worker.host import WorkerHost
from stator.worker.kv_events import KvPublisher
from stator.worker.prefill import PrefillWorker
from stator.worker.progress import ProgressWatchdog

__all__ = [
    "DecodeWorker",
    "KvPublisher",
    "PrefillWorker",
    "ProgressWatchdog",
    "WorkerAdapters",
    "WorkerHost",
    "disagg_policy",
    "make_engine",
    "prefill_queue",
    "start_engine",
]
