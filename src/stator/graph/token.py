"""The deployment's token: where it comes from, and how it is made on the first use."""

import os
import re
import secrets
from pathlib import Path

from stator.config import environment
from stator.config.token_file import read_token_file
from stator.errors import ConfigError

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


TOKEN_KEY = "token"
"""In discovery, where nodes read a token that the first of them drew."""


def check_namespace(namespace: str, given_as: str = "--namespace") -> None:
    """Raises ConfigError, which names given_as."""
    if not _NAMESPACE.fullmatch(namespace):
        raise ConfigError(
            f"{given_as} {namespace}: expected 1 to 63 letters, digits, dots, dashes and underscores, "
            f"beginning with a letter or digit"
        )


def default_token_file(namespace: str) -> Path:
    return environment.state_directory() / f"{namespace}.token"


def find_given_token(token_file: Path | None) -> str | None:
    """What this start was given: STATOR_TOKEN, else the file that was named. Raises ConfigError as `find_token`."""
    if (token := environment.token()) is not None:
        return token
    return None if token_file is None else read_token_file(token_file)


def find_token(namespace: str, token_file: Path | None) -> str | None:
    """STATOR_TOKEN, else the file that was named, else this user's file for the namespace; None if there is none.

    Raises ConfigError for a file that cannot be used, among them one that others may read.
    """
    if (token := find_given_token(token_file)) is not None:
        return token
    default = default_token_file(namespace)
    return read_token_file(default) if default.exists() else None


def make_token(namespace: str) -> str:
    """Write a new token to this user's file for the namespace, mode 0600; if another process was first, its token."""
    path = default_token_file(namespace)
    token = secrets.token_urlsafe(32)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Linked into place whole: another process must never read half a token.
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(token + "\n")
            os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
    except FileExistsError:
        return read_token_file(path)
    except OSError as error:
        raise ConfigError(
            f"the token file {path} cannot be made: {error.strerror}; set STATOR_TOKEN or XDG_STATE_HOME"
        ) from None
    return token


def find_or_make_token(namespace: str, token_file: Path | None) -> str:
    """For whoever starts a deployment. Raises ConfigError as `find_token` and `make_token`."""
    found = find_token(namespace, token_file)
    return make_token(namespace) if found is None else found


def place_of_token(namespace: str, token_file: Path | None) -> str:
    """What another node is to do for the token that was found here, and for TLS if this node uses it."""
    if environment.token() is not None:
        place = "set the same STATOR_TOKEN there"
    else:
        path = token_file or default_token_file(namespace)
        place = f"copy {path} to the same place there, or give it with --token-file"
    return (
        place
        if environment.tls() is None
        else f"{place}; and set STATOR_TLS_DIR to files of its own (stator certs issue)"
    )


def missing_token(namespace: str, head: str) -> str:
    """What to tell someone who joins without a token."""
    return (
        f"joining {head} needs the deployment's token, and there is none here. The head has it in its STATOR_TOKEN, "
        f"or in {default_token_file(namespace)} of the user who started it. Copy that file to the same place here "
        f"(mode 600), or give it with --token-file FILE, or set STATOR_TOKEN. A hub of another namespace has the token "
        f"of that one"
    )
