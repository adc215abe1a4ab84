"""The line that a frontend logs of each request, for a tenth of what `Logger.info` costs there.

Every request pays for its line, and most of what `logging` does for one is to find out where in the source it was
logged, by which thread and which process: nobody asks that of an access log, whose place is always the same.
"""

import logging
import time

NAME = "stator.frontend.access"
_logger = logging.getLogger(NAME)
_SAME = vars(logging.makeLogRecord({"name": NAME, "levelno": logging.INFO, "levelname": "INFO", "pathname": __file__}))


class AccessRecord(logging.LogRecord):
    """Of level INFO and logger NAME. message: the whole line. Handlers and filters take it as any other record; its
    place in the source and its thread are those of this module when it was loaded."""

    def __init__(self, message: str) -> None:  # pyright: ignore[reportMissingSuperCall] - which is what costs
        created = time.time()
        self.__dict__ = {**_SAME, "msg": message, "created": created, "msecs": created % 1 * 1000}


def is_enabled() -> bool:
    return _logger.isEnabledFor(logging.INFO)


def log(message: str) -> None:
    """Only if `is_enabled`: the caller asks before it makes the message."""
    _logger.handle(AccessRecord(message))
