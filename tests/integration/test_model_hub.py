"""Models on a hub: huggingface_hub itself against a hub on loopback (testing.fake_model_hub)."""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

import stator
from stator.config import hub_download
from stator.config.hub import Needs, resolve, resolve_async
from stator.engines.registry import create_engine
from stator.errors import ConfigError
from stator.processor import ModelTokenizer
from stator.testing.engine_bench import running_engines
from stator.testing.fake_model_hub import FakeModel, FakeModelHub

TINY = Path(stator.__file__).parent / "models" / "tiny-llama"
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
TOKEN = "hf_ThisIsTheSecretOfThisTest"
COMMIT = "1" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeModelHub]:
    """A hub with acme/tiny, which this process uses, with an empty cache and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(hub_download, "RETRY_DELAY_S", 0.01)
    with FakeModelHub({"acme/tiny": FakeModel.of_directory(TINY)}, known_tokens=(TOKEN, "hf_other")) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


def environment(hub: FakeModelHub, cache: Path, **more: str) -> dict[str, str]:
    hidden = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return {
        **kept,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache.parent),
        "PYTHONPATH": os.pathsep.join(sys.path),
        **more,
    }


def test_the_tokenizer_comes_without_weights_and_the_weights_come_later(hub: FakeModelHub, cache: Path) -> None:
    first = resolve("acme/tiny", needs=Needs.TOKENIZER)
    assert sorted(hub.num_gets) == SMALL and set(hub.num_gets.values()) == {1}
    here, there = ModelTokenizer.load(TINY), ModelTokenizer.load(first.directory)
    assert there.encode("Hello!", add_special_tokens=True) == here.encode("Hello!", add_special_tokens=True)

    second = resolve("acme/tiny")
    assert second == first and (second.model_id, second.revision) == ("acme/tiny", COMMIT)
    assert second.directory == cache / "models--acme--tiny" / "snapshots" / COMMIT
    assert sorted(hub.num_gets) == [*SMALL[:2], "model.safetensors", *SMALL[2:]]
    assert set(hub.num_gets.values()) == {1}
    assert (second.directory / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert second.engine_model_string == "acme/tiny"


def test_directories_stay_what_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(TINY, tmp_path / "mine")
    resolved = resolve(str(tmp_path / "mine"), "main")
    assert resolved.directory == tmp_path / "mine" and resolved.revision == ""
    assert resolved.engine_model_string == str(tmp_path / "mine")
    assert "revision main means nothing" in caplog.text


def test_what_is_pinned_and_complete_asks_the_hub_for_nothing(hub: FakeModelHub) -> None:
    resolved = resolve("acme/tiny")
    before = hub.num_requests
    assert resolve("acme/tiny", resolved.revision) == resolved
    assert hub.num_requests == before


def test_a_branch_that_moves_is_followed_and_a_commit_is_not(
    hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hub.models["acme/tiny"]
    assert resolve("acme/tiny").revision == COMMIT
    model.commits = {"main": "2" * 40, "v1": COMMIT}
    model.files["README.md"] = b"new"
    monkeypatch.setattr(hub_download, "free_bytes", lambda _: 0)
    moved = resolve("acme/tiny")
    assert moved.revision == "2" * 40
    # The weights are the same content: they are not fetched again, and need no room.
    assert hub.num_gets["model.safetensors"] == 1 and (moved.directory / "model.safetensors").exists()
    assert resolve("acme/tiny", "v1").revision == resolve("acme/tiny", COMMIT).revision == COMMIT


def test_only_one_format_of_the_weights_is_fetched(hub: FakeModelHub) -> None:
    hub.models["acme/tiny"].files |= {"pytorch_model.bin": b"b" * 99, "original/consolidated.00.pth": b"p" * 99}
    resolve("acme/tiny", needs=Needs.VLLM)
    assert hub.num_gets["model.safetensors"] == 1
    assert not any(path.endswith((".bin", ".pth")) for path in hub.num_gets)


def test_an_index_names_the_files(hub: FakeModelHub) -> None:
    files = hub.models["acme/tiny"].files
    files["a.safetensors"], files["other.safetensors"] = files.pop("model.safetensors"), b"x" * 9
    files["model.safetensors.index.json"] = b'{"weight_map": {"w": "a.safetensors"}}'
    resolve("acme/tiny")
    assert hub.num_gets["a.safetensors"] == 1 and "other.safetensors" not in hub.num_gets
    files["model.safetensors.index.json"] = b'{"weight_map": {"w": "b.safetensors"}}'
    hub.models["acme/tiny"].commits = {"main": "2" * 40}
    with pytest.raises(ConfigError, match="names b.safetensors, which the hub does not have"):
        resolve("acme/tiny")


@pytest.mark.parametrize(
    ("change", "token", "message"),
    [
        ({"model": "acme/tyny"}, None, "there is no model at http.*/acme/tyny, or it is private.*HF_TOKEN"),
        ({"model": "acme/tyny"}, TOKEN, "there is no model at http.*/acme/tyny, or it is private"),
        ({"gated": True}, None, "it is gated.*Log in at http.*/acme/tiny, accept.*set HF_TOKEN"),
        ({"gated": True}, "hf_other", "account of the token in use has no access: open http.*/acme/tiny"),
        ({}, "hf_wrong", "the hub refused the token .HF_TOKEN.*mistyped, expired or revoked"),
        ({"revision": "v9"}, None, "no revision 'v9'"),
        ({"files": {}}, None, "there is no config.json in http"),
        ({"files": {"config.json": b"{}", "pytorch_model.bin": b"b"}}, None, "no weights in a format"),
    ],
)
def test_refusals_say_what_to_do(
    hub: FakeModelHub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, object],
    token: str | None,
    message: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    model = hub.models["acme/tiny"]
    if change.get("gated"):
        model.gated, model.tokens = True, (TOKEN,)
    if "files" in change:
        model.files = change["files"]  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(str(change.get("model", "acme/tiny")), change.get("revision"))  # type: ignore[arg-type]
    assert str(caught.value).startswith("model acme/t")
    if token is not None:
        assert token not in str(caught.value) and token not in caplog.text


def test_a_gated_model_with_access(hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models["acme/tiny"].gated, hub.models["acme/tiny"].tokens = True, (TOKEN,)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (resolve("acme/tiny").directory / "model.safetensors").exists()


def test_offline(hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set, and the cache .* has no revision main"):
        resolve("acme/tiny")
    with pytest.raises(ConfigError, match=f"has no commit {COMMIT}"):
        resolve("acme/tiny", COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    resolve("acme/tiny", needs=Needs.TOKENIZER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="has no weights of it.*hf download.*HF_HOME"):
        resolve("acme/tiny")
    before = hub.num_requests
    assert resolve("acme/tiny", needs=Needs.TOKENIZER).revision == COMMIT
    assert hub.num_requests == before


def test_a_hub_that_is_away(hub: FakeModelHub, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.broken = True
    with pytest.raises(ConfigError, match="the hub has trouble .503"):
        resolve("acme/tiny")
    hub.broken = False
    resolved = resolve("acme/tiny")
    hub.broken = True
    assert resolve("acme/tiny") == resolved
    assert f"taking commit {COMMIT} from the cache" in caplog.text
    # A cache that another program filled has no list of the files.
    shutil.rmtree(cache / "models--acme--tiny" / "trees")
    assert resolve("acme/tiny", COMMIT) == resolved


def test_no_network(hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="127.0.0.1:9 cannot be reached .*HF_HOME.*give the directory as model"):
        resolve("acme/tiny")


def test_a_broken_connection_goes_on_where_it_was(hub: FakeModelHub) -> None:
    content = os.urandom(25_000_000)
    model = hub.models["acme/tiny"]
    model.files["model.safetensors"], model.cut_after["model.safetensors"] = content, [22_000_000]
    resolved = resolve("acme/tiny")
    assert (resolved.directory / "model.safetensors").read_bytes() == content
    # The library writes, and so keeps, pieces of 10 MiB.
    assert hub.num_gets["model.safetensors"] == 2 and hub.ranges == [f"bytes={20 << 20}-"]


def test_a_download_that_was_interrupted_keeps_the_files_that_are_complete(
    hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub.models["acme/tiny"].files
    files["a.safetensors"], files["b.safetensors"] = files.pop("model.safetensors"), b"b" * 300_000
    monkeypatch.setattr(hub_download, "NUM_CONNECTIONS", 1)
    stop = threading.Event()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            resolve("acme/tiny", stop=stop)
        except BaseException as error:
            ended.append(error)

    hub.hold("b.safetensors")
    thread = threading.Thread(target=run)
    thread.start()
    assert hub.holding.wait(10)
    stop.set()
    thread.join(5)
    assert not thread.is_alive() and isinstance(ended[0], hub_download.Stopped)
    hub.release()
    directory = resolve("acme/tiny").directory
    assert (directory / "b.safetensors").read_bytes() == b"b" * 300_000
    assert hub.num_gets["a.safetensors"] == 1 and hub.num_gets["b.safetensors"] == 2


def test_too_little_disk(hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "free_bytes", lambda _: 1_000_000)
    with pytest.raises(ConfigError, match=r"7.61 MB are to be downloaded, .* has 1 MB free; .*HF_HOME"):
        resolve("acme/tiny")
    assert "model.safetensors" not in hub.num_gets


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "is full"), (errno.EROFS, "cannot be written")])
def test_a_disk_that_refuses(hub: FakeModelHub, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hub_download, "hf_hub_download", refuse)
    with pytest.raises(ConfigError, match=f"{message}.*HF_HOME"):
        resolve("acme/tiny")


DOWNLOAD = """
import logging, sys
from stator.config.hub import resolve
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
print("RESULT", resolve("acme/tiny").directory, flush=True)
"""


def test_several_processes_download_once(hub: FakeModelHub, cache: Path) -> None:
    hub.hold("model.safetensors")
    command = [sys.executable, "-c", DOWNLOAD]
    processes = [
        subprocess.Popen(
            command, env=environment(hub, cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(3)
    ]
    outputs: list[list[str]] = [[] for _ in processes]
    waiting = threading.Barrier(3)  # two that wait, and this test

    def read(process: "subprocess.Popen[str]", lines: list[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "another process downloads its weights" in line and "(0 s)" in line:
                with contextlib.suppress(threading.BrokenBarrierError):
                    waiting.wait(30)

    readers = [threading.Thread(target=read, args=pair) for pair in zip(processes, outputs, strict=True)]
    try:
        for reader in readers:
            reader.start()
        waiting.wait(30)
        hub.release()
        assert [process.wait(30) for process in processes] == [0, 0, 0], outputs
        for reader in readers:
            reader.join(10)
    finally:
        waiting.abort()
        for process in processes:
            process.kill()
            process.communicate()
    assert hub.num_gets == dict.fromkeys([*SMALL, "model.safetensors"], 1)
    assert sum("downloading 1 files, 7.61 MB" in "".join(lines) for lines in outputs) == 1
    assert all(any(line.startswith("RESULT") for line in lines) for lines in outputs)
    assert not any("\r" in line or "%|" in line for lines in outputs for line in lines), "a bar"


CANCEL = """
import asyncio, signal, sys
from stator.config.hub import resolve_async

async def main():
    task = asyncio.ensure_future(resolve_async("acme/tiny"))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        print("cancelled", flush=True)

asyncio.run(main())
"""


def test_sigterm_ends_a_download_at_once_and_its_part_is_removed_by_the_next(hub: FakeModelHub, cache: Path) -> None:
    hub.hold("model.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-c", CANCEL], env=environment(hub, cache), stdout=subprocess.PIPE, text=True
    )
    try:
        assert hub.holding.wait(30)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=5)
        assert process.returncode == 0
        assert output == "cancelled\n" and time.monotonic() - began < 5
    finally:
        process.kill()
        process.communicate()
    blobs = cache / "models--acme--tiny" / "blobs"
    assert len(list(blobs.glob("*.incomplete"))) == 1
    hub.release()
    resolve("acme/tiny")
    assert list(blobs.glob("*.incomplete")) == []


def test_the_loop_stays_free_while_a_model_is_downloaded(hub: FakeModelHub) -> None:
    async def main() -> None:
        hub.hold("model.safetensors")
        task = asyncio.ensure_future(resolve_async("acme/tiny"))
        async with asyncio.timeout(10):
            await asyncio.to_thread(hub.holding.wait, 10)
            hub.release()
            resolved = await task
        assert resolved.revision == COMMIT
        with pytest.raises(ConfigError, match="no model at"):
            await resolve_async("acme/none")

    asyncio.run(main())


def test_the_local_engine_loads_a_model_of_the_hub(hub: FakeModelHub) -> None:
    async def main() -> None:
        engine = create_engine("local", {"model": "acme/tiny", "revision": "main", "num_gpu_blocks_override": 8})
        async with running_engines(engine) as (one,):
            assert (one.info.model, one.info.model_id) == ("acme/tiny", "acme/tiny")

    asyncio.run(main())
