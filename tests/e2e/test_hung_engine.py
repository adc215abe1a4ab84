"""An engine that hangs in a step: its requests go on elsewhere, and its process is started again."""

import json
import time
from pathlib import Path

import pytest
from metrics import parse, total
from processes import EXAMPLES
from test_graphs import LONG_STORY, Head

pytestmark = pytest.mark.timeout(240)

GRAPH = '''
import pathlib
import threading
import time

from components.frontend import Frontend
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker as Worker
from stator.graph import on_start, on_stop, service

ORDER = pathlib.Path(__file__).with_name("hang")


@service(name="VllmWorker", role="decode")
class VllmWorker(Worker):
    """Its engine hangs in a step once the file ORDER is there, which the first to see it takes away."""

    hung = ""

    @on_start
    def arm(self) -> None:
        runner, step = self.engine._runner, self.engine._runner.step

        def may_hang(chunks):
            try:
                self.hung = ORDER.read_text()
                ORDER.unlink()
            except FileNotFoundError:
                return step(chunks)
            threading.Event().wait()

        runner.step = may_hang

    @on_stop
    def hold_the_loop(self) -> None:
        if self.hung == "loop":
            time.sleep(3600)


Frontend.link(Processor).link(Router).link(VllmWorker)
'''


@pytest.mark.parametrize("also_hangs", ["thread", "loop"])
def test_requests_go_on_elsewhere_and_the_worker_comes_back(also_hangs: str, tmp_path: Path) -> None:
    """thread: the process ends by itself, without the thread of the step. loop: not even that; its node kills it."""
    for name in ("components", "configs"):
        (tmp_path / name).symlink_to(EXAMPLES / name)
    (tmp_path / "hanging.py").write_text(GRAPH)
    flags = ["--VllmWorker.ServiceArgs.workers=2", "--VllmWorker.progress-timeout=1.5"]
    head = Head("hanging.py", tmp_path / "state", *flags, cwd=tmp_path)
    try:
        bodies = [{"messages": LONG_STORY, "max_tokens": 300, "stream": True, "ignore_eos": True}] * 6
        results = head.send(bodies, when_streaming=lambda: (tmp_path / "hang").write_text(also_hangs))
        head.serve.wait_for(r"goes on elsewhere after [1-9]\d* tokens", 5)
        said = head.serve.wait_for(r"stator: VllmWorker:\d hung: .*made no step for ([\d.]+) s with \d requests", 30)
        assert 1.5 <= float(said.group(1)) < 6
        assert [r["error"] for r in results] == [None] * 6
        (text,) = {r["text"] for r in results}
        deadline = time.monotonic() + 60
        while json.loads(head.curl("/health"))["models"]["tiny-llama"]["decode"] < 2:
            assert time.monotonic() < deadline, head.serve.output
        while total(parse(head.curl("/metrics")), "stator_worker_stalls_total") != 1:
            assert time.monotonic() < deadline
        assert {r["text"] for r in head.send(bodies)} == {text}
    finally:
        assert head.serve.stop() == 0
