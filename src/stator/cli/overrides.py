"""`--Service.key.sub=value` among the other arguments."""

import re
from collections.abc import Sequence

_OVERRIDE = re.compile(r"--[A-Za-z_]\w*\.[^=]+")
_NUMBER = re.compile(r"-[0-9.]")


def split_overrides(arguments: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(flag, value) pairs, and the arguments that are none.

    Both `--S.key=value` and `--S.key value` are taken; a flag that another option or nothing follows is `true`.
    Nothing after `--` is looked at.
    """
    overrides: list[tuple[str, str]] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        index += 1
        if argument == "--":
            rest += arguments[index - 1 :]
            break
        flag, separator, value = argument.partition("=")
        if not _OVERRIDE.fullmatch(flag):
            rest.append(argument)
        elif separator:
            overrides.append((flag, value))
        elif index < len(arguments) and _is_value(arguments[index]):
            overrides.append((flag, arguments[index]))
            index += 1
        else:
            overrides.append((flag, "true"))
    return overrides, rest


def _is_value(argument: str) -> bool:
    return not argument.startswith("-") or _NUMBER.match(argument) is not None
