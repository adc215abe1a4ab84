"""A hub of its own that is told to stop. (Killed and wiped ones: tests/e2e/chaos, scenes 11.)"""

from pathlib import Path

import pytest
from processes import Serve, free_port
from prompts import PROMPTS
from test_graphs import Head

pytestmark = pytest.mark.timeout(120)


class Joined(Head):
    """A graph that joins a hub."""

    def __init__(self, state: Path, port: int, hub_port: int) -> None:
        self.port, self.hub_port, self.state = port, hub_port, state
        flags = ["-f", "configs/tiny.yaml", "--join", f"127.0.0.1:{hub_port}", f"--Frontend.port={port}"]
        self.serve = Serve(["serve", "graphs.agg:Frontend", *flags], state_dir=state)
        self.serve.wait_for("joined", 60)
        self.serve.wait_for("Try it", 60)


def test_a_hub_that_is_told_to_stop_leaves_the_deployment_serving(tmp_path: Path) -> None:
    port, hub_port = free_port(), free_port()
    where = ["--hub-host", "127.0.0.1", "--hub-port", str(hub_port), "--advertise", "127.0.0.1"]
    hub = Serve(["hub", *where], state_dir=tmp_path)
    node: Joined | None = None
    try:
        hub.wait_for("The hub is ready", 30)
        node = Joined(tmp_path, port, hub_port)
        body = {"messages": PROMPTS[0], "max_tokens": 4}
        assert node.send([body])[0]["error"] is None
        assert hub.stop() == 0
        assert "who serves goes on" in hub.output
        assert node.send([body])[0]["error"] is None
        hub = Serve(["hub", *where], state_dir=tmp_path)
        hub.wait_for("The hub is ready", 30)
        assert node.send([body])[0]["error"] is None
        assert node.serve.stop() == 0
    finally:
        for serve in [hub, *([node.serve] if node else [])]:
            if serve.process.poll() is None:
                serve.kill_tree()
