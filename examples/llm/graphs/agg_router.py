"""Workers that prefill and decode; a Router chooses among them. Prefill workers may join."""

from components.frontend import Frontend
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker

Frontend.link(Processor).link(Router).link(VllmWorker)
