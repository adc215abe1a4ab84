"""The other end of `KillablePool`: a process that takes jobs from its standard input, one at a time."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import BinaryIO

from stator.runtime.killable import ANSWERED, FAILED, LENGTH

_PR_SET_PDEATHSIG = 1


def serve(handle: Callable[[bytes], bytes]) -> None:
    """Answer jobs until there are no more. Call it when all is loaded that jobs need: it tells that this is so.

    An exception ends its job, not the process; of it the pool learns the type alone, since its message may quote what
    somebody sent. For the same reason nothing that is printed from here on is seen by anybody.
    """
    with os.fdopen(os.dup(1), "wb") as answers, os.fdopen(os.dup(0), "rb") as jobs:
        nobody = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nobody, 1)
        os.dup2(nobody, 2)
        _send(answers, ANSWERED, b"")
        while (payload := _receive(jobs)) is not None:
            try:
                answer = handle(payload)
            except Exception as error:
                _send(answers, FAILED, type(error).__name__.encode())
            else:
                _send(answers, ANSWERED, answer)


def guard() -> None:
    """Before anything is loaded: end with the parent, whatever is being done then, and keep to the pool's max_bytes."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The terminal's interrupt is for the parent, which ends its children when it is done with them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    max_bytes = os.environ.get("KILLABLE_MAX_BYTES")
    if max_bytes is not None:
        with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already
            resource.setrlimit(resource.RLIMIT_DATA, (int(max_bytes), int(max_bytes)))


def _receive(jobs: BinaryIO) -> bytes | None:
    head = jobs.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    payload = jobs.read(size)
    return payload if len(payload) == size else None


def _send(answers: BinaryIO, kind: int, payload: bytes) -> None:
    answers.write(LENGTH.pack(len(payload) + 1) + bytes([kind]) + payload)
    answers.flush()
