"""`stator serve` with a model on a hub: downloaded once for all processes, and served; Ctrl-C during a download."""

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Serve, free_port
from reference import Reference

import stator
from stator.testing.fake_model_hub import FakeModel, FakeModelHub

pytestmark = pytest.mark.timeout(240)

TINY = Path(stator.__file__).parent / "models" / "tiny-llama"
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def hub() -> Iterator[FakeModelHub]:
    with FakeModelHub({"acme/tiny": FakeModel.of_directory(TINY)}) as running:
        yield running


def serve(hub: FakeModelHub, tmp_path: Path, port: int) -> Serve:
    return Serve(
        [
            "serve",
            "graphs.disagg_router:Frontend",
            "-f",
            "configs/tiny.yaml",
            f"--Frontend.port={port}",
            "--Frontend.served_model_name=tiny",
            "--hub-port",
            str(free_port()),
            "--advertise",
            "127.0.0.1",
            "--Common.model=acme/tiny",
            "--VllmWorker.revision=main",
        ],
        state_dir=tmp_path,
        env={"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"},
    )


def test_a_model_of_the_hub_is_downloaded_once_and_served(hub: FakeModelHub, tmp_path: Path) -> None:
    port = free_port()
    head = serve(hub, tmp_path, port)
    try:
        head.wait_for("ready", 90)
        head.wait_for("model.safetensors is complete .1 of 1 files.; downloaded 7.61 of 7.61 MB", 5)
        assert hub.num_gets["model.safetensors"] == hub.num_gets["tokenizer.json"] == 1

        body = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["content"] == Reference().chat(HELLO, 24).text
    finally:
        head.stop()


def test_ctrl_c_ends_a_start_that_waits_for_a_download(hub: FakeModelHub, tmp_path: Path) -> None:
    hub.hold("model.safetensors")
    head = serve(hub, tmp_path, free_port())
    try:
        head.wait_for("another process downloads its weights; waiting", 60)
        began = time.monotonic()
    finally:
        head.stop(15)
    assert time.monotonic() - began < 15


def test_what_the_hub_refuses_stops_the_start_with_one_line(hub: FakeModelHub, tmp_path: Path) -> None:
    hub.models["acme/tiny"].gated, hub.models["acme/tiny"].tokens = True, ("hf_somebody",)
    head = serve(hub, tmp_path, free_port())
    try:
        head.wait_for("model acme/tiny: it is gated: its owner asks users to accept terms", 60)
        assert head.process.wait(30) != 0
    finally:
        head.stop()
    assert "Traceback" not in head.output
