"""Tests of real vLLM. They run in the environment that has it (`make test-vllm`), and nowhere else is a file of them
even imported; a run that came here without it ends with a line that says what was not run.

This directory must never have an `__init__.py`: `tests` is on the path of modules, and the directory would hide vLLM.
"""

from collections.abc import Generator
from pathlib import Path

import pytest

from stator.engines.vllm.version import installed_version

HERE = Path(__file__).parent
NOT_RUN = "not run: tests/vllm, since vLLM is not installed in this environment; make test-vllm installs and runs it"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if installed_version() is None and collection_path.is_relative_to(HERE) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if installed_version() is None:
        terminalreporter.write_line(NOT_RUN, yellow=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test without the marker would be left out of `-m vllm`, and nobody would notice.

    Warnings are errors in these tests as well, but for torch's of its own use: which test meets them depends on what
    vLLM has cached on this machine.
    """
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.filterwarnings(r"ignore::DeprecationWarning:torch\."))
    unmarked = [item.nodeid for item in items if item.path.is_relative_to(HERE) and not item.get_closest_marker("vllm")]
    if unmarked:
        raise pytest.UsageError(f"without the marker vllm: {', '.join(unmarked)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Nothing is skipped here: what could not run has failed."""
    report = yield
    if report.skipped and item.path.is_relative_to(HERE):
        report.outcome = "failed"
        report.longrepr = f"skipped, which counts as a failure here: {report.longrepr}"
    return report
