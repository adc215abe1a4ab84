import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stator import __version__
from stator.cli import main
from stator.cli.overrides import split_overrides


@pytest.mark.parametrize(
    ("arguments", "overrides", "rest"),
    [
        (["t", "--A.b=1", "-f", "x"], [("--A.b", "1")], ["t", "-f", "x"]),
        (["--A.b", "1", "t"], [("--A.b", "1")], ["t"]),
        (["t", "--A.b-c.d", "-1"], [("--A.b-c.d", "-1")], ["t"]),
        (["t", "--A.b", "-f", "x"], [("--A.b", "true")], ["t", "-f", "x"]),
        (["t", "--A.b", "--C.d="], [("--A.b", "true"), ("--C.d", "")], ["t"]),
        (["t", "--A.b"], [("--A.b", "true")], ["t"]),
        (["t", "--A.b=x=y.z"], [("--A.b", "x=y.z")], ["t"]),
        (["t", "--join=10.0.0.1:1", "--host", "a.b"], [], ["t", "--join=10.0.0.1:1", "--host", "a.b"]),
        (["t", "--", "--A.b=1"], [], ["t", "--", "--A.b=1"]),
    ],
)
def test_overrides(arguments: list[str], overrides: list[tuple[str, str]], rest: list[str]) -> None:
    assert split_overrides(arguments) == (overrides, rest)


def test_version_and_help() -> None:
    result = CliRunner().invoke(main.typer_app, ["version"])
    assert (result.exit_code, result.output) == (0, f"{__version__}\n")
    result = CliRunner().invoke(main.typer_app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "--join" in result.output and "module[:Service]" in result.output


def test_usage_errors_exit_with_2() -> None:
    assert CliRunner().invoke(main.typer_app, ["serve"]).exit_code == 2
    assert CliRunner().invoke(main.typer_app, ["serve", "x", "--nonsense"]).exit_code == 2


def test_a_target_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = CliRunner().invoke(main.typer_app, ["serve", "no_such_module_here:X"])
    assert result.exit_code == 2
    assert "stator: target 'no_such_module_here:X': there is no module" in result.output


def test_help_does_not_import_what_serving_needs() -> None:
    code = "import sys; import stator.cli.main; print([m for m in ('msgspec', 'uvloop', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


def test_the_example_is_found() -> None:
    directory = main.example_directory()
    assert all((directory / config).is_file() for config in main.DEMO_CONFIGS.values())
    assert (directory / "graphs" / "disagg_router.py").is_file()
