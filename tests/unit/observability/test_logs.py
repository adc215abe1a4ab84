import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from stator.errors import ConfigError
from stator.observability.logs import setup_logging


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def log_line(**environ: str) -> str:
    stream = io.StringIO()
    setup_logging("VllmWorker", "w1", environ=environ, stream=stream)
    logging.getLogger("stator.test").info("started %d", 3)
    logging.getLogger("stator.test").debug("detail")
    return stream.getvalue()


def test_text_line():
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO VllmWorker\[w1\] started 3\n", log_line())


def test_json_line():
    fields = json.loads(log_line(STATOR_LOG_FORMAT="json"))
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "INFO",
        "component": "VllmWorker",
        "instance": "w1",
        "logger": "stator.test",
        "message": "started 3",
    }


def test_level_from_the_environment():
    assert log_line(STATOR_LOG_LEVEL="debug").endswith("detail\n")
    assert log_line(STATOR_LOG_LEVEL="ERROR") == ""


@pytest.mark.parametrize("name", ["STATOR_LOG_LEVEL", "STATOR_LOG_FORMAT"])
def test_other_values_are_refused_by_name(name: str):
    with pytest.raises(ConfigError, match=f"{name} is 'loud'; expected one of"):
        setup_logging("c", "i", environ={name: "loud"})


def test_tracebacks_stay_in_one_json_line():
    stream = io.StringIO()
    setup_logging("c", "i", environ={"STATOR_LOG_FORMAT": "json"}, stream=stream)
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("stator.test").exception("failed")
    assert "ValueError: bad" in json.loads(stream.getvalue())["traceback"]


def test_lines_that_somebody_else_prefixes_do_not_say_their_source_again() -> None:
    stream = io.StringIO()
    setup_logging("VllmWorker", "1", environ={}, stream=stream, prefixed=True)
    logging.getLogger("stator.worker").info("hello")
    assert stream.getvalue().rstrip().endswith("Z INFO hello")
