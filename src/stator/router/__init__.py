"""The Router: a thin shell around core.routing."""

from stator.router.router import Router

__all__ = ["Router"]
