"""The Router: a thin shell around core.routing."""

from stator.router.local import LinkedRouter, LocalRouter
from stator.router.router import Router, queue_limits, router_mode

__all__ = ["LinkedRouter", "LocalRouter", "Router", "queue_limits", "router_mode"]
