"""Prefill and decode on different workers, one of each here; the Processor goes round the decode workers in turn."""

from components.frontend import Frontend
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(VllmWorker).link(PrefillWorker)
