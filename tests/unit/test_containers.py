"""The images' files, as far as they can be checked where no Docker engine runs."""

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTAINER = ROOT / "container"
DOCKERFILES = [CONTAINER / "Dockerfile", CONTAINER / "Dockerfile.cpu"]
SCRIPTS = [CONTAINER / "build.sh", CONTAINER / "run.sh"]


def named(path: Path) -> str:
    return path.name


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Name and arguments of each instruction, with continued lines joined and comments left out."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in joined.split("\n")) if name
    ]


def arguments(dockerfile: Path, name: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == name]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=named)
def test_the_instructions_are_docker_s(dockerfile: Path) -> None:
    known = {"FROM", "ENV", "RUN", "COPY", "WORKDIR", "EXPOSE", "USER", "ENTRYPOINT", "CMD"}
    found = [name for name, _ in instructions(dockerfile)]
    assert found[0] == "FROM" and set(found) <= known
    assert found.count("ENTRYPOINT") == found.count("CMD") == 1


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=named)
def test_base_images_are_pinned_by_tag(dockerfile: Path) -> None:
    images = arguments(dockerfile, "FROM")
    assert images
    for image in images:
        tag = image.split()[0].rpartition(":")[2]
        assert re.search(r"\d+\.\d+", tag) and "latest" not in tag, image


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=named)
def test_what_is_copied_exists_and_is_sent_to_the_build(dockerfile: Path) -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    copies = arguments(dockerfile, "COPY")
    assert copies
    for copy in copies:
        *sources, _ = copy.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_no_token_and_no_environment_is_sent_to_a_build() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in (".venv", ".venv-vllm", ".git", "stator.token", ".env"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in allowed)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=named)
def test_it_does_not_run_as_root(dockerfile: Path) -> None:
    found = instructions(dockerfile)
    last = max(index for index, (name, _) in enumerate(found) if name == "USER")
    user = found[last][1].split(":")[0]
    assert user.isdigit() and int(user) > 0
    assert all(name in ("ENTRYPOINT", "CMD", "EXPOSE", "WORKDIR") for name, _ in found[last + 1 :])


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=named)
def test_no_index_and_no_secret_is_in_it(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    assert "://" not in text
    assert not re.search(r"^(ARG|ENV).*(TOKEN|SECRET|PASSWORD|INDEX)", text, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_the_scripts_are_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    shellcheck = shutil.which("shellcheck")
    if shellcheck is not None:  # .ci/run has it.
        done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_help_is_the_comment_at_the_top(script: Path) -> None:
    done = subprocess.run([str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    top = script.read_text().split("\nset -euo")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in top]


Run = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script of ours with a `docker` that writes down what it is given. Exit code, its arguments, errors."""
    bin_directory, home, work = tmp_path / "bin", tmp_path / "home", tmp_path / "work dir"
    for directory in (bin_directory, home, work):
        directory.mkdir()
    given = tmp_path / "given"
    docker = bin_directory / "docker"
    docker.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {given}\n')
    docker.chmod(0o755)
    # As root, the caller of sudo is who the container runs as.
    base = {"PATH": f"{bin_directory}:/usr/bin:/bin", "HOME": str(home), "SUDO_UID": "4321", "SUDO_GID": "4322"}

    def call(script: str, *args: str, **env: str) -> tuple[int, list[str], str]:
        given.unlink(missing_ok=True)
        done = subprocess.run(
            [str(CONTAINER / script), *args], cwd=work, env={**base, **env}, capture_output=True, text=True
        )
        found = given.read_text().split("\0")[:-1] if given.exists() else []
        return done.returncode, found, done.stderr

    return call


def user() -> str:
    return "4321:4322" if os.geteuid() == 0 else f"{os.geteuid()}:{os.getegid()}"


def test_run_on_gpus(run: Run, tmp_path: Path) -> None:
    code, given, errors = run("run.sh", "-it", "serve", "graphs.agg:Frontend", "-f", "a b.yaml", "--dry-run")
    assert (code, errors) == (0, "")
    home, work = tmp_path / "home", tmp_path / "work dir"
    rdma = ["--device", "/dev/infiniband"] if Path("/dev/infiniband").is_dir() else []
    assert given == [
        "run", "--rm", "--init", "--network", "host", "--ipc", "host", "--stop-timeout", "40", "--user", user(),
        "--interactive", "--tty",
        "--gpus", "all", *rdma, "--ulimit", "memlock=-1", "--ulimit", "stack=67108864",
        "--volume", f"{home}/.cache/huggingface:/home/stator/.cache/huggingface",
        "--volume", f"{home}/.cache/vllm:/home/stator/.cache/vllm",
        "--volume", f"{home}/.local/state/stator:/home/stator/.local/state/stator",
        "--volume", f"{work}:{work}", "--workdir", f"{work}",
        "stator:gpu", "serve", "graphs.agg:Frontend", "-f", "a b.yaml", "--dry-run",
    ]  # fmt: skip
    # Docker would have made them, as root.
    for mounted in (".cache/huggingface", ".cache/vllm", ".local/state/stator"):
        made = (home / mounted).stat()
        assert f"{made.st_uid}:{made.st_gid}" == user()


def test_run_on_cpus(run: Run) -> None:
    code, given, _ = run("run.sh", "--cpu", "--tag", "mine:1", "--", "demo")
    assert code == 0
    assert not {"--gpus", "--device", "--interactive", "--tty"} & set(given)
    assert given[-2:] == ["mine:1", "demo"]
    assert run("run.sh", "--cpu", "demo")[1][-2:] == ["stator:cpu", "demo"]


def test_secrets_go_by_name(run: Run, tmp_path: Path) -> None:
    values = {"STATOR_TOKEN": "geheim1", "HF_TOKEN": "geheim2", "NCCL_DEBUG": "INFO", "OTHER": "geheim3"}
    file = tmp_path / "env"
    file.write_text("STATOR_TOKEN=geheim4\n")
    code, given, _ = run("run.sh", "--env-file", str(file), "version", **values)
    assert code == 0
    passed = {given[index + 1] for index, argument in enumerate(given) if argument == "--env"}
    assert passed == {"STATOR_TOKEN", "HF_TOKEN", "NCCL_DEBUG"}
    assert given[given.index("--env-file") + 1] == str(file)
    assert "geheim" not in " ".join(given)


def test_caches_that_lie_elsewhere_are_mounted_and_their_places_not_passed_on(run: Run, tmp_path: Path) -> None:
    places = {"HF_HOME": str(tmp_path / "hf"), "VLLM_CACHE_ROOT": str(tmp_path / "vc"), "HF_HUB_CACHE": "/x"}
    _, given, _ = run("run.sh", "version", **places)
    assert f"{tmp_path}/hf:/home/stator/.cache/huggingface" in given
    assert f"{tmp_path}/vc:/home/stator/.cache/vllm" in given
    assert "--env" not in given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.sh", "--gpu", "demo"), "run.sh: unknown option --gpu"),
        (("run.sh", "--env-file", "nowhere"), "run.sh: --env-file nowhere: there is no such file"),
        (("run.sh", "--tag"), "run.sh: --tag needs a name"),
        (("build.sh", "stator:x"), "build.sh: unknown option stator:x"),
        (("build.sh", "--cpu", "--wheels", "nowhere"), "build.sh: --wheels nowhere: there is no such directory"),
        (("build.sh", "--wheels", "."), "build.sh: --wheels is for --cpu"),
    ],
)
def test_wrong_options_start_nothing(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, given, errors = run(*arguments)
    assert (code, given) == (2, [])
    assert errors.startswith(message)


def test_without_docker(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bin" / "docker").unlink()
    if shutil.which("docker", path="/usr/bin:/bin"):
        pytest.skip("this machine has Docker in /usr/bin")
    for script in ("run.sh", "build.sh"):
        assert run(script) == (2, [], f"{script}: docker is not installed\n")


def test_build(run: Run, tmp_path: Path) -> None:
    code, given, errors = run("build.sh", "--", "--pull")
    assert (code, errors) == (0, "")
    assert given == ["build", "--tag", "stator:gpu", "--file", f"{CONTAINER}/Dockerfile", "--pull", f"{ROOT}"]
    (tmp_path / "wheels").mkdir()
    _, given, errors = run("build.sh", "--cpu", "--tag", "x:1", "--wheels", f"{tmp_path}/wheels")
    assert errors == ""
    assert given == [
        "build", "--tag", "x:1", "--file", f"{CONTAINER}/Dockerfile.cpu", "--build-context",
        f"wheels={tmp_path}/wheels", f"{ROOT}",
    ]  # fmt: skip


def test_the_address_of_an_index_is_a_secret_of_the_build(run: Run) -> None:
    code, given, errors = run("build.sh", "--cpu", TORCH_INDEX="https://name:geheim@example.org/cpu")
    assert (code, errors) == (0, "")
    assert "id=torch_index,env=TORCH_INDEX" in given and "geheim" not in " ".join(given)
    context = next(argument for argument in given if argument.startswith("wheels="))
    assert not Path(context.removeprefix("wheels=")).exists(), "the empty directory is left behind"
    assert "neither --wheels nor TORCH_INDEX" in run("build.sh", "--cpu")[2]
