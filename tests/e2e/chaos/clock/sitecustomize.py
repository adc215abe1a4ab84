"""On the path of a node's processes, Python loads this at their start: their wall clock is off by the seconds that the
file CHAOS_CLOCK names. Clocks that only ever go forward are left alone, as by somebody who sets a machine's time.

(libfaketime, which does this below Python, breaks the timed waits by which CPython's threads take turns.)
"""

import os
import time

_LOOK_EVERY_S = 0.05

_file = os.environ["CHAOS_CLOCK"]
_time_ns, _monotonic = time.time_ns, time.monotonic
_looked_at, _offset_ns = -1.0, 0


def _now_ns() -> int:
    global _looked_at, _offset_ns
    if _monotonic() - _looked_at > _LOOK_EVERY_S:
        _looked_at = _monotonic()
        with open(_file, encoding="ascii") as file:
            _offset_ns = int(file.read() or 0) * 1_000_000_000
    return _time_ns() + _offset_ns


time.time_ns = _now_ns
time.time = lambda: _now_ns() / 1e9
