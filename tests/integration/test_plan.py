"""`stator plan`, and the fit that `stator serve --dry-run` prints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llm"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NATS_", "ETCD", "STATOR_"))}
    return {**environment, "XDG_STATE_HOME": str(tmp_path / "state"), "HF_HUB_CACHE": str(tmp_path / "hub")}


def stator(*arguments: str, env: dict[str, str], cwd: Path = EXAMPLES) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stator.cli.main", *arguments],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def planned(*arguments: str, env: dict[str, str], code: int = 0) -> dict[str, Any]:
    done = stator("plan", *arguments, "--json", env=env)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "gpus", "weights_gb", "requests", "warnings"),
    [
        ("multinode-405b.yaml", "8xH100-80GB", 410, 40, 0),
        ("multinode-405b.yaml", "8xA100-80GB", 410, 40, 1),
        ("multinode_llama49b.yaml", "8xA100-80GB", 100, 1000, 0),
        ("multinode_llama49b.yaml", "8xA100-40GB", 100, 400, 0),
    ],
)
def test_the_big_configurations(
    name: str, gpus: str, weights_gb: int, requests: int, warnings: int, env: dict[str, str]
) -> None:
    made = planned("-f", f"configs/{name}", "--gpus", gpus, env=env)
    assert [fit["section"] for fit in made["fits"]] == ["VllmWorker", "PrefillWorker"]
    for fit in made["fits"]:
        assert round(fit["report"]["weight_bytes"] / 1e9) == weights_gb
        assert requests < fit["report"]["kv"]["requests"] < 2 * requests
        warned = [f for f in fit["findings"] if f["level"] == "warn"]
        assert len(warned) == warnings and not [f for f in fit["findings"] if f["level"] == "refuse"]
        for finding in warned:
            assert finding["where"] == f"{fit['section']}.quantization" and "multiplies in 16 bit" in finding["message"]
            line = int(finding["origin"].removeprefix(f"configs/{name}:"))
            text = (EXAMPLES / "configs" / name).read_text().splitlines()
            assert text[line - 1].strip().startswith("quantization: modelopt")


def test_what_does_not_fit_is_refused(env: dict[str, str]) -> None:
    arguments = ("-f", "configs/multinode-405b.yaml", "--gpus", "8xA100-40GB")
    done = stator("plan", *arguments, "--VllmWorker.tensor-parallel-size=4", env=env)
    assert done.returncode == 1
    assert re.search(r"refuse +VllmWorker.model the weights take 102.5 GB on each GPU, more than", done.stdout)
    assert done.stdout.splitlines()[-1] == "Would not start: VllmWorker, PrefillWorker"
    made = planned("-f", "configs/multinode-405b.yaml", "--gpus", "4xH100-80GB", env=env, code=1)
    found = [f for f in made["fits"][0]["findings"] if f["level"] == "refuse"]
    assert [f["where"] for f in found] == ["VllmWorker.ServiceArgs"]
    assert "8 asked (VllmWorker:1 8), 4 there" in found[0]["message"] and found[0]["origin"].startswith("configs/")


def test_from_anywhere_and_for_one_component(env: dict[str, str], tmp_path: Path) -> None:
    done = stator("plan", "-f", "configs/multinode_llama49b.yaml", "--gpus", "8xH100-80GB", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "49.9 B parameters" in done.stdout and "196.0 KiB a token" in done.stdout
    own = tmp_path / "own.yaml"
    own.write_text("PrefillWorker: {model: 'stator:tiny-llama', engine: vllm, ServiceArgs: {resources: {gpu: 1}}}\n")
    done = stator("plan", "-f", "own.yaml", "--gpus", "1xL4-24GB", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "PrefillWorker  (stator:tiny-llama)" in done.stdout and "VllmWorker" not in done.stdout
    target = "components.prefill_worker:PrefillWorker"
    done = stator("plan", target, "-f", "configs/multinode-405b.yaml", "--gpus", "8xH200-141GB", env=env)
    assert done.returncode == 0, done.stderr
    assert "PrefillWorker  (" in done.stdout and "VllmWorker  (" not in done.stdout


def test_mistakes(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("VllmWorker:\n  model: m\n  max-num-seq: 3\n")
    done = stator("plan", "-f", "c.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert "c.yaml:3: VllmWorker.max-num-seq: unknown key" in done.stderr and "max-num-seqs" in done.stderr
    (tmp_path / "c.yaml").write_text("Frontend: {port: 1}\n")
    done = stator("plan", "-f", "c.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2 and "found no worker's section" in done.stderr
    done = stator("plan", "-f", "not-here.yaml", env=env, cwd=tmp_path)
    assert done.returncode == 2 and "not-here.yaml" in done.stderr
    done = stator("plan", "-f", "configs/tiny.yaml", "--gpus", "many", env=env)
    assert done.returncode == 2 and "expected COUNTxNAME-MEMORY" in done.stderr


def test_a_configuration_for_the_local_engine(env: dict[str, str]) -> None:
    done = stator("plan", "-f", "configs/tiny.yaml", env=env)
    assert done.returncode == 0 and "VllmWorker: engine local, nothing to check" in done.stdout


def test_the_dry_run_tells_the_fit_and_stops_nothing(env: dict[str, str]) -> None:
    arguments = ["serve", "graphs.agg:Frontend", "-f", "configs/multinode-405b.yaml", "--dry-run"]
    done = stator(*arguments, "--assume-gpus", "8xH100-80GB", env=env)
    assert done.returncode == 0, done.stderr
    fit = done.stdout[done.stdout.index("\nFit\n") :]
    assert "405.9 B parameters" in fit and "8 x H100, 85.0 GB usable" in fit
    arguments += ["--assume-gpus", "8xA100-40GB", "--json"]
    done = stator(*arguments, env=env)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    (fit,) = made["fits"]
    assert [f["where"] for f in fit["findings"] if f["level"] == "refuse"] == ["VllmWorker.model"]
    assert made["refusal"]
    done = stator("serve", "graphs.agg:Frontend", "-f", "configs/tiny.yaml", "--dry-run", "--json", env=env)
    assert json.loads(done.stdout)["fits"] == []
