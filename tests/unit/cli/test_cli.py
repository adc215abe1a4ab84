import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stator import __version__
from stator.cli import main
from stator.cli.overrides import split_overrides
from stator.engines.environments import Marker, default_directory, interpreter, write_marker
from stator.graph.node import ServeOptions


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


def test_engine_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    runner = CliRunner()
    result = runner.invoke(main.typer_app, ["engine", "path", "vllm-cpu"])
    assert result.exit_code == 2 and "stator: the engine vllm-cpu is not installed" in result.stderr
    result = runner.invoke(main.typer_app, ["engine", "install", "vllm-gpu"])
    assert result.exit_code == 2 and "there is no engine environment 'vllm-gpu'; known: vllm-cpu" in result.stderr
    directory = default_directory("vllm-cpu")
    interpreter(directory).parent.mkdir(parents=True)
    interpreter(directory).symlink_to(sys.executable)
    write_marker(directory, Marker(engine="vllm-cpu 0.32.0", ready=True))
    result = runner.invoke(main.typer_app, ["engine", "path", "vllm-cpu"])
    assert (result.exit_code, result.stdout) == (0, f"{directory}/bin/python\n")


def demo_options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], ServeOptions]:
    """What `stator demo` installs, and what it would run."""
    installed: list[str] = []
    run: list[ServeOptions] = []
    monkeypatch.setattr(main, "install_engine", lambda name, **_: installed.append(name))
    monkeypatch.setattr(main, "_run", run.append)
    result = CliRunner().invoke(main.typer_app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    return installed, run[0]


def test_the_demo_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, options = demo_options(monkeypatch, "--engine", "vllm", "--allow-untested-engine")
    assert installed == ["vllm-cpu"]
    assert options.config == Path("configs/tiny-vllm.yaml") and options.allow_untested_engine
    (line,) = options.join_lines
    assert line.command == ("stator", "demo", "--engine", "vllm")
    assert line.otherwise is not None and line.otherwise.startswith("make demo ENGINE=vllm JOIN={head}")
    # Who joins such a head needs the engine too.
    installed, options = demo_options(monkeypatch, "--engine", "vllm", "--join", "h:1")
    assert installed == ["vllm-cpu"] and options.target == main.DEMO_COMPONENT
    installed, options = demo_options(monkeypatch)
    assert installed == [] and options.config == Path("configs/tiny.yaml") and not options.allow_untested_engine
    assert options.join_lines[0].command == ("stator", "demo")
