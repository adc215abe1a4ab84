"""Does to itself what jobs ask for, for tests of the pool that runs it."""

import ctypes
import os
import sys

from stator.runtime import killable_child


def handle(payload: bytes) -> bytes:
    what, _, rest = payload.partition(b" ")
    match what:
        case b"echo":
            return rest
        case b"pid":
            return str(os.getpid()).encode()
        case b"parent":
            return str(os.getppid()).encode()
        case b"loop":
            # In C, with the interpreter lock: no signal handler and no other thread of Python ever runs.
            ctypes.PyDLL(None).pause()
        case b"crash":
            os._exit(7)
        case b"raise":
            raise ValueError(rest.decode())
        case b"end":
            # A library's way to say that it cannot go on, which no `except Exception` catches.
            raise SystemExit(rest.decode())
        case b"print":
            sys.stderr.write("nor for a log")
            sys.stdout.write("not an answer")
            sys.stdout.flush()
            os.write(1, b"nor this")
        case b"eat":
            return str(len(bytearray(int(rest)))).encode()
        case b"environ":
            return ",".join(sorted(name for name in os.environ if name.startswith("STATOR"))).encode()
    return b""


if __name__ == "__main__":
    killable_child.guard()
    if "fail" in sys.argv:
        sys.exit(3)
    killable_child.serve(handle)
