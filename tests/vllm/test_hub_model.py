"""vLLM is told a hub id and a commit, as on every node, and finds in the cache what `resolve` brought."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stator
from stator.testing.fake_model_hub import FakeModel, FakeModelHub

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
TINY = Path(stator.__file__).parent / "models" / "tiny-llama"

SCRIPT = """
import json, sys
from stator.config.hub import Needs, resolve

model = resolve("acme/tiny", needs=Needs.VLLM)
print("RESOLVED", flush=True)
sys.stdin.readline()

from vllm import LLM, SamplingParams, TokensPrompt

case = json.load(open(sys.argv[1]))["greedy"][0]
llm = LLM(
    model=model.engine_model_string, revision=model.revision, tokenizer_revision=model.revision, dtype="float32",
    enforce_eager=True, kv_cache_memory_bytes=16 << 20, block_size=64, max_model_len=512,
)
output = llm.generate(
    [TokensPrompt(prompt_token_ids=case["prompt_ids"])],
    SamplingParams(temperature=0, max_tokens=case["max_tokens"]),
    use_tqdm=False,
)
config = llm.llm_engine.vllm_config.model_config
print("OUTPUT", json.dumps([config.model, config.revision, list(output[0].outputs[0].token_ids), case["output_ids"]]))
"""


def test_vllm_loads_what_is_in_the_cache_by_its_id(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(SCRIPT)
    hidden = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_")
    with FakeModelHub({"acme/tiny": FakeModel.of_directory(TINY)}) as hub:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(hidden)},
            "PYTHONPATH": str(SOURCE),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        with subprocess.Popen(
            [sys.executable, str(script), str(ROOT / "tests" / "golden" / "tiny-llama.json")],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                assert process.stdout is not None and process.stdin is not None
                resolved = process.stdout.readline()
                fetched = hub.num_gets.copy()
                process.stdin.write("\n")
                output, errors = process.communicate(timeout=200)
            finally:
                process.kill()
    assert resolved == "RESOLVED\n" and process.returncode == 0, errors[-8000:]
    line = next(line for line in output.splitlines() if line.startswith("OUTPUT "))
    model, revision, token_ids, expected = json.loads(line.removeprefix("OUTPUT "))
    assert (model, revision) == ("acme/tiny", "1" * 40)
    assert token_ids == expected
    # It asks for the head of the weights, to learn their types; nothing is downloaded again.
    size = len(hub.models["acme/tiny"].files["model.safetensors"])
    assert hub.num_gets.keys() == fetched.keys() and fetched["model.safetensors"] == 1
    assert hub.num_bytes["model.safetensors"] < 1.1 * size, hub.ranges
