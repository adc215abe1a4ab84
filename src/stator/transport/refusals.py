"""The errors that the request plane itself ends streams with; each says what happened, to what, and what to do."""

from stator.errors import ErrorCode, StatorError

TOKEN_SOURCES = "set STATOR_TOKEN or pass --token-file, with the token of the deployment (the head prints where it is)"


def too_many_streams(limit: int) -> StatorError:
    return StatorError(
        ErrorCode.OVERLOADED, f"{limit} streams are open on this connection, as many as it takes; try again later"
    )


def instance_stopped(instance_id: str) -> StatorError:
    return StatorError(ErrorCode.INSTANCE_LOST, f"instance {instance_id} stopped")


def wrong_namespace(server: str, caller: str) -> StatorError:
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"this server is of namespace {server!r}, the caller of {caller!r}; give both the same --namespace",
    )


def stale_instance(wanted: str, found: str) -> StatorError:
    return StatorError(
        ErrorCode.STALE_INSTANCE, f"instance {wanted} is gone; its address now belongs to instance {found or '?'}"
    )
