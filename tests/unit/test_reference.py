"""docs/reference is what tools/make_reference.py writes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "tools" / "make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize(("name", "text"), pages().items(), ids=lambda value: value if len(value) < 40 else "page")
def test_the_reference_is_fresh(name: str, text: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == text, f"docs/reference/{name} is stale; run: .venv/bin/python tools/make_reference.py"


def test_it_says_what_matters() -> None:
    made = pages()
    assert "| `ServiceArgs" not in made["config.md"]
    assert "| `resources.gpu` | a number, at least 0 (GPUs) | `0` |" in made["config.md"]
    assert "| `tensor-parallel-size` | a whole number | `1` |" in made["config.md"]
    assert "--dry-run" in made["cli.md"] and "--assume-gpus" in made["cli.md"]
