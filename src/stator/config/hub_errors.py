"""Failures of the hub, of the network and of the disk in plain words."""

import errno
from typing import Any

from huggingface_hub import constants, errors, get_token

from stator.errors import ConfigError

_NETWORK_ERROR: Any = errors.HfHubHTTPError.__mro__[1]
"""The base class of all that huggingface_hub's HTTP library raises; which library that is depends on its version."""


def response_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def root_of(error: BaseException) -> BaseException:
    """The hub's library wraps an error of the network when the cache has no answer either."""
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: the network, a busy hub; not a refusal."""
    error = root_of(error)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    status = response_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, errors.LocalEntryNotFoundError):
        return True
    return isinstance(error, (_NETWORK_ERROR, ConnectionError, TimeoutError)) or _is_short(error)


def _is_short(error: BaseException) -> bool:
    return type(error) is OSError and "Consistency check failed" in str(error)


def explain(error: BaseException, model: str, revision: str) -> ConfigError:
    """What happened, to which model, and what to do. Never has the token's text."""
    return ConfigError(f"model {model}: {_scrub(_what(root_of(error), model, revision))}")


def _what(error: BaseException, model: str, revision: str) -> str:
    page = f"{constants.ENDPOINT}/{model}"
    if isinstance(error, errors.GatedRepoError):
        return _gated(page)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub has the model, but no revision {revision!r}; {page}/tree/main has a list"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{page} has no such file: {error}"
    status = response_status(error)
    if status == 401 and _has_token():
        return (
            "the hub refused the token (HF_TOKEN, or the one that `hf auth login` saved): it is mistyped, expired or "
            f"revoked, or there is no model at {page}; make a new one at {constants.ENDPOINT}/settings/tokens"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no model at {page}, or it is private; check the name (and there is no directory {model}). For a "
            "private one set HF_TOKEN, on every node, to a token of an account that may read it"
        )
    if isinstance(error, errors.HFValidationError):
        return f"not a name that the hub could have: {error}"
    return _status(error, status, page) if status is not None else _local(error)


def _gated(page: str) -> str:
    if _has_token():
        return (
            f"it is gated, and the account of the token in use has no access: open {page} with that account, accept "
            "the terms (some owners approve by hand, so that it takes a while), or set HF_TOKEN to another's token"
        )
    return (
        f"it is gated: its owner asks users to accept terms. Log in at {page}, accept them, and set HF_TOKEN to a "
        "token of that account on every node (or run `hf auth login` there)"
    )


def _status(error: BaseException, status: int, page: str) -> str:
    if status == 403:
        return f"the hub forbids access to {page} (403): the token lacks the permission to read it, or it is disabled"
    if status == 429:
        return "the hub limits our requests (429): wait some minutes; with a token (HF_TOKEN) the limit is higher"
    if status >= 500:
        return f"the hub has trouble ({status} for {page}); try again later"
    return f"the hub answered {status} for {page}: {error}"


def _local(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {constants.HF_HUB_CACHE} is full; free some, or set HF_HOME to a directory on another"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to a directory that "
            "this user may write"
        )
    if isinstance(error, errors.OfflineModeIsEnabled) or is_transient(error):
        return not_reached(f"{type(error).__name__}: {error}")
    return f"the download failed: {type(error).__name__}: {error}"


def not_reached(reason: str) -> str:
    """No network, and not in the cache."""
    return (
        f"{constants.ENDPOINT} cannot be reached ({reason}), and the cache {constants.HF_HUB_CACHE} does not have the "
        "model. Either give this node a way there (HTTPS_PROXY, or a mirror in HF_ENDPOINT), or download it elsewhere "
        "and set HF_HOME to a copy of that cache, or give the directory as model"
    )


def offline(model: str, what: str) -> ConfigError:
    return ConfigError(
        f"model {model}: HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} has no {what}. Unset it, or "
        "fill the cache on a node with network (`hf download`) and set HF_HOME to it, or give a directory as model"
    )


def _has_token() -> bool:
    return bool(_token())


def _token() -> str | None:
    try:
        return get_token()
    except Exception:
        return None


def _scrub(text: str) -> str:
    token = _token()
    return text.replace(token, "***") if token else text
