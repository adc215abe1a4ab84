"""Reading a token from a file that nobody else may read."""

import stat
from pathlib import Path

from stator.errors import ConfigError


def read_token_file(path: Path) -> str:
    """Raises ConfigError for a file that cannot be used, among them one that others may read."""
    try:
        status = path.stat()
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"the token file {path} cannot be read: {reason}") from None
    if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise ConfigError(f"the token file {path} may be read by others; run: chmod 600 {path}")
    if not text:
        raise ConfigError(f"the token file {path} is empty")
    return text
