"""The committed goldens, computed afresh by transformers on torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "make_goldens.py"


@pytest.mark.oracle
@pytest.mark.timeout(500)
def test_the_committed_goldens_are_what_transformers_says_today() -> None:
    # One thread: the models are small, and threads that wait for each other cost eight times the work.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(GOLDEN), "--check"], capture_output=True, text=True, timeout=480, env=env
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
