"""Whoever installs the package, without the repository, has the demo too."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import REPOSITORY, Serve, free_port

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as an installation would lay it out."""
    wheels = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(REPOSITORY)]
    subprocess.run(pip, check=True, timeout=180)
    (wheel,) = wheels.glob("stator-*.whl")
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-decilm"])
def test_the_bundled_models_ship_in_the_wheel(site: Path, model: str) -> None:
    weights = site / "stator" / "models" / model / "model.safetensors"
    assert 1_000_000 < weights.stat().st_size <= 8_000_000


def test_the_demo_runs_from_the_wheel(site: Path, tmp_path: Path) -> None:
    ports = ["--port", str(free_port()), "--hub-port", str(free_port())]
    env = {"PYTHONPATH": str(site)}
    where = [sys.executable, "-c", "import stator; print(stator.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site)), "the repository's own code would run, not the wheel's"
    serve = Serve(["demo", *ports], state_dir=tmp_path, cwd=tmp_path, env=env)
    try:
        serve.wait_for("ready", 90)
    finally:
        assert serve.stop() == 0
