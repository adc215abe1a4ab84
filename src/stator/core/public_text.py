"""Texts of others' exceptions, as far as a client may read them. Pure."""

import re

MAX_CHARS = 300
NOT_TOLD = "the worker's log says why"

_INTERNAL = re.compile(
    r"""(?<![\w#$])/(?:[\w.\-]+/)+[\w.\-]+    # a file of this machine; not a reference in a schema, as #/$defs/a
    | \b0x[0-9a-fA-F]{6,} | \bTraceback\b | \bFile\ " | <[\w.]+\ (?:object|function|class|module)\b | <class\ '
    | \b[A-Za-z_]\w*(?:\.\w+)+\( | \b(?:tcp|ipc|unix|http|https)://""",
    re.VERBOSE,
)


def shows_internals(text: str) -> bool:
    """An address, a file, an object or a piece of a traceback."""
    return _INTERNAL.search(text) is not None


def harmless(text: str) -> str:
    """Its first line, cut; or NOT_TOLD, if that shows something of the machine or of the code."""
    line = next((each.strip() for each in text.splitlines() if each.strip()), "")
    if not line or shows_internals(line):
        return NOT_TOLD
    return line if len(line) <= MAX_CHARS else line[:MAX_CHARS] + "..."
