"""An access record is a record like any other to whoever handles it."""

import json
import logging
import logging.handlers
import queue

import pytest

from stator.observability import access_log
from stator.observability.logs import JsonFormatter, TextFormatter


@pytest.fixture
def record(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    caplog.set_level(logging.INFO, access_log.NAME)
    access_log.log("chat 100%s done")
    (record,) = caplog.records
    return record


def test_it_has_every_attribute_that_a_record_has(record: logging.LogRecord) -> None:
    usual = logging.getLogger(access_log.NAME).makeRecord(access_log.NAME, logging.INFO, "f", 1, "m", (), None)
    assert [name for name in vars(usual) if not hasattr(record, name)] == []
    assert usual.created - 60 < record.created <= usual.created
    assert record.msecs == pytest.approx(record.created * 1000 % 1000, abs=1)


def test_formatters_take_it(record: logging.LogRecord) -> None:
    assert TextFormatter("Frontend[0]").format(record).endswith("Z INFO Frontend[0] chat 100%s done")
    found = json.loads(JsonFormatter("Frontend", "0").format(record))
    assert (found["message"], found["logger"]) == ("chat 100%s done", "stator.frontend.access")
    everything = " ".join(f"%({name})s" for name in vars(logging.makeLogRecord({})) if name not in ("msg", "args"))
    logging.Formatter(f"%(message)s %(asctime)s {everything}").format(record)


def test_it_can_be_queued_for_another_process(record: logging.LogRecord) -> None:
    queued = logging.handlers.QueueHandler(queue.SimpleQueue()).prepare(record)
    assert queued.getMessage() == "chat 100%s done"
    assert vars(queued)["name"] == access_log.NAME


def test_a_level_and_a_filter_keep_it_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, access_log.NAME)
    assert not access_log.is_enabled()
    caplog.set_level(logging.INFO, access_log.NAME)
    assert access_log.is_enabled()
    logger = logging.getLogger(access_log.NAME)
    keep_out = lambda record: "secret" not in record.getMessage()  # noqa: E731
    logger.addFilter(keep_out)
    try:
        access_log.log("secret")
        access_log.log("told")
    finally:
        logger.removeFilter(keep_out)
    assert [record.getMessage() for record in caplog.records] == ["told"]
