"""Graphs of services: `@service`, `depends`, `.link()`, `@endpoint` and the hooks around a service's life."""

from stator.graph.client import ServiceClient
from stator.graph.context import ServiceContext
from stator.graph.service import depends, endpoint, on_drain, on_start, on_stop, service

__all__ = ["ServiceClient", "ServiceContext", "depends", "endpoint", "on_drain", "on_start", "on_stop", "service"]
