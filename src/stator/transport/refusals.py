"""The errors that the request plane itself ends streams with; each says what happened, to what, and what to do."""

from stator.errors import ErrorCode, StatorError

TOKEN_SOURCES = "set STATOR_TOKEN or pass --token-file, with the token of the deployment (the head prints where it is)"

HUB_ROLE = "hub"
"""The role in a hub's identity."""


def too_many_streams(limit: int) -> StatorError:
    return StatorError(
        ErrorCode.OVERLOADED, f"{limit} streams are open on this connection, as many as it takes; try again later"
    )


def instance_stopped(instance_id: str) -> StatorError:
    return StatorError(ErrorCode.INSTANCE_LOST, f"instance {instance_id} stopped")


def wrong_namespace(server: str, caller: str, *, is_hub: bool = False) -> StatorError:
    """is_hub: the server may be told to take others as well."""
    others = (
        f"; or, for a frontend that serves both, list {caller!r} in Frontend.namespaces of the head, or start "
        f"`stator hub` with --also {caller}"
    )
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"this server is of namespace {server!r}, the caller of {caller!r}; give both the same --namespace"
        f"{others if is_hub else ''}",
    )


def stale_instance(wanted: str, found: str) -> StatorError:
    return StatorError(
        ErrorCode.STALE_INSTANCE, f"instance {wanted} is gone; its address now belongs to instance {found or '?'}"
    )
