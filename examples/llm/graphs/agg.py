"""Workers that prefill and decode; the Processor goes round them in turn."""

from components.frontend import Frontend
from components.processor import Processor
from components.worker import VllmWorker

Frontend.link(Processor).link(VllmWorker)
