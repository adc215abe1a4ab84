"""Logging setup of every Stator process, and the line a worker writes about its engine."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

import msgspec

from stator.errors import ConfigError
from stator.messages.engine import EngineLoad
from stator.observability.stats import worker_rates

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
FORMATS = ("text", "json")


def _timestamp(created: float) -> str:
    """UTC, milliseconds, sortable as text."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))
    return f"{seconds}.{int(created * 1000) % 1000:03d}Z"


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z LEVEL source message`, without source if that is empty; a traceback follows on its own
    lines."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = f"{source} " if source else ""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record.created)} {record.levelname} {self._source}{record.getMessage()}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, component, instance, logger, message, and traceback if there is one."""

    def __init__(self, component: str, instance: str) -> None:
        super().__init__()
        self._component = component
        self._instance = instance
        self._encoder = msgspec.json.Encoder()

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record.created),
            "level": record.levelname,
            "component": self._component,
            "instance": self._instance,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return self._encoder.encode(fields).decode()


def setup_logging(
    component: str,
    instance: str,
    *,
    environ: Mapping[str, str] = os.environ,
    stream: TextIO | None = None,
    prefixed: bool = False,
) -> None:
    """Send the root logger's records to stream (default stderr), replacing handlers it had.

    prefixed: whoever reads the stream puts the source before each line of text, as the supervisor does.

    STATOR_LOG_LEVEL (default INFO) and STATOR_LOG_FORMAT (text or json) come from environ. Raises ConfigError for
    other values.
    """
    level = environ.get("STATOR_LOG_LEVEL", "INFO").upper()
    if level not in LEVELS:
        raise ConfigError(f"STATOR_LOG_LEVEL is {environ['STATOR_LOG_LEVEL']!r}; expected one of {', '.join(LEVELS)}")
    form = environ.get("STATOR_LOG_FORMAT", "text").lower()
    if form not in FORMATS:
        raise ConfigError(f"STATOR_LOG_FORMAT is {form!r}; expected one of {', '.join(FORMATS)}")
    source = "" if prefixed else f"{component}[{instance}]"
    formatter = JsonFormatter(component, instance) if form == "json" else TextFormatter(source)
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def format_worker_stats(before: EngineLoad, after: EngineLoad, seconds: float) -> str:
    """The line a worker logs every five seconds, from two readings that are `seconds` apart."""
    rates = worker_rates(before, after, seconds)
    return (
        f"Avg prompt throughput: {rates.prompt_tokens_per_s:.1f} tokens/s, "
        f"Avg generation throughput: {rates.generation_tokens_per_s:.1f} tokens/s, "
        f"Running: {after.num_running} reqs, Waiting: {after.num_waiting} reqs, "
        f"KV cache usage: {rates.kv_usage:.1%}, Prefix cache hit rate: {rates.prefix_hit_rate:.1%}"
    )
