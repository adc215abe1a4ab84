"""One more address for a running deployment: Frontend, Processor and Router, and no worker.

Serve it with --join, or with the deployment's etcd and NATS. It routes to the workers that are there already.
"""

from components.frontend import Frontend
from components.processor import Processor
from components.router import Router

Frontend.link(Processor).link(Router)
