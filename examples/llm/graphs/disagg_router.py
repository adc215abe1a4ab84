"""Prefill and decode on different workers, one of each here; a Router chooses the decode worker."""

from components.frontend import Frontend
from components.prefill_worker import PrefillWorker
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker).link(PrefillWorker)
