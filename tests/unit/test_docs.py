"""What the documents point at exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "stator"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("requirements/*.md")])

_FENCED = re.compile(r"^ {4}.*$|```.*?```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")


def names(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_links_resolve(document: Path) -> None:
    targets = _LINK.findall(_FENCED.sub("", document.read_text()))
    missing = [t for t in targets if "://" not in t and not (document.parent / t).exists()]
    assert not missing


def test_architecture_names_files_that_exist() -> None:
    paths = _PATH.findall((ROOT / "ARCHITECTURE.md").read_text())
    assert len(paths) > 20
    known = (ROOT, PACKAGE)
    missing = [p for p in paths if not p.startswith("instances/") and not any((k / p).exists() for k in known)]
    assert not missing
