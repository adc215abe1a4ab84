"""Runs a client's uses one after the other and prints what came of each: an object by the use's name, as JSON.

`{"chat": {"gave": ...}, "stream": {"failed": "the traceback"}}`: one use that fails does not hide the others.
"""

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

_uses: dict[str, Callable[[], Any]] = {}


def use(function: Callable[[], Any]) -> Callable[[], Any]:
    """A function, or a coroutine's, that returns what JSON can hold."""
    _uses[function.__name__] = function
    return function


def run_all() -> None:
    sys.stdout.write(json.dumps({name: _run(function) for name, function in _uses.items()}))


def _run(function: Callable[[], Any]) -> dict[str, Any]:
    try:
        gave = asyncio.run(function()) if inspect.iscoroutinefunction(function) else function()
    except Exception:
        return {"failed": traceback.format_exc()}
    return {"gave": gave}
