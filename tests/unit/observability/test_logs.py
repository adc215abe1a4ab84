import errno
import io
import json
import logging
import logging.config
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stator.errors import ConfigError
from stator.observability.logs import BackgroundHandler, JsonFormatter, TextFormatter, setup_logging


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


class SlowReader:
    """Takes no line until it is told to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.reads = threading.Event()
        self.asked = threading.Event()

    def write(self, lines: str) -> None:
        self.asked.set()
        assert self.reads.wait(10)
        self.lines += lines.split("\n")


def _log(handler: logging.Handler, text: str) -> None:
    handler.handle(logging.makeLogRecord({"msg": text, "levelname": "INFO", "levelno": logging.INFO}))


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_log_that_nobody_reads_holds_nobody_up(form: str) -> None:
    reader = SlowReader()
    handler = BackgroundHandler(reader.write, max_lines=3)
    handler.setFormatter(JsonFormatter("c", "i") if form == "json" else TextFormatter(""))
    _log(handler, "first")
    assert reader.asked.wait(10)
    for number in range(10):
        _log(handler, f"line {number}")
    reader.reads.set()
    handler.flush()
    _log(handler, "last")
    handler.close()
    messages = [json.loads(line)["message"] if form == "json" else line.split("INFO ")[-1] for line in reader.lines]
    assert messages[:4] == ["first", "line 0", "line 1", "line 2"]
    assert messages[4].endswith("7 lines of this log were dropped: nobody read it")
    assert messages[5:] == ["last"]


def test_a_library_that_configures_logging_does_not_silence_it() -> None:
    lines: list[str] = []
    handler = BackgroundHandler(lines.append)
    handler.setFormatter(TextFormatter(""))
    _log(handler, "before")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    _log(handler, "after")
    handler.flush()
    assert [line.split("INFO ")[-1] for line in lines] == ["before", "after"]


def test_lines_that_come_while_others_are_written_are_written_together() -> None:
    writes: list[str] = []
    reader = SlowReader()
    handler = BackgroundHandler(lambda lines: (writes.append(lines), reader.write(lines))[0])
    _log(handler, "0")
    assert reader.asked.wait(10)
    for number in range(1, 250):
        _log(handler, str(number))
    reader.reads.set()
    handler.close()
    assert reader.lines == [str(number) for number in range(250)]
    assert [len(lines.split("\n")) for lines in writes] == [1, 100, 100, 49]


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    def write(line: str) -> None:
        if "lost" in line:
            raise OSError(errno.ENOSPC, "no space left on device")
        lines.append(line)

    lines: list[str] = []
    handler = BackgroundHandler(write)
    for text in ("one", "lost", "two"):
        _log(handler, text)
        handler.flush()
    handler.close()
    assert lines == ["one", "two"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_writes_its_own_lines(tmp_path: Path) -> None:
    file = tmp_path / "log"

    def write(line: str) -> None:
        with file.open("a") as log:
            log.write(line + "\n")

    handler = BackgroundHandler(write)
    _log(handler, "before")
    handler.flush()
    pid = os.fork()
    if not pid:
        try:
            _log(handler, "forked")
            handler.flush()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    _log(handler, "after")
    handler.close()
    assert file.read_text().split() == ["before", "forked", "after"]
