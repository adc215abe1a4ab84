import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stator.errors import ConfigError
from stator.graph.service import spec_of
from stator.graph.targets import load_target

PARTS = """
from stator.graph import depends, service

@service
class Low: ...

@service
class Top:
    low = depends(Low)

class Plain: ...

number = 5
"""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "pkg_t").mkdir()
    (tmp_path / "pkg_t" / "__init__.py").write_text("")
    (tmp_path / "pkg_t" / "parts.py").write_text(PARTS)
    (tmp_path / "pkg_t" / "linked.py").write_text("from pkg_t.parts import Low, Top\n\nTop.link(Low)\n")
    (tmp_path / "pkg_t" / "broken.py").write_text("x = 1\nimport not_there_at_all\n")
    (tmp_path / "pkg_t" / "wrong_link.py").write_text("from pkg_t.parts import Low, Top\n\nLow.link(Top)\n")
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("pkg_t.parts:Low", "Low"),
        ("pkg_t/parts.py:Top", "Top"),
        ("pkg_t.linked", "Top"),
        ("pkg_t/linked.py", "Top"),
        ("pkg_t.linked:Low", "Low"),
    ],
)
def test_targets(directory: Path, target: str, name: str) -> None:
    assert spec_of(load_target(target, directory)).name == name


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (":Top", "names no module"),
        ("pkg_t.nothing:Top", "there is no module 'pkg_t.nothing' in "),
        ("nothing.at.all:Top", "there is no module 'nothing' in "),
        ("pkg_t/nothing.py", "there is no file "),
        ("pkg_t.parts:Topp", "pkg_t.parts has no attribute 'Topp'; its services: Low, Top; did you mean Top?"),
        ("pkg_t.parts:Plain", "Plain is the class Plain, not a service: decorate the class with @service"),
        ("pkg_t.parts:number", "number is a int, not a service"),
        ("pkg_t.parts", "which service? Give one of them: pkg_t.parts:NAME, NAME one of Low, Top"),
        (
            "pkg_t.broken:Top",
            "importing pkg_t.broken failed: ModuleNotFoundError: No module named 'not_there_at",
        ),
        ("pkg_t.broken:Top", "broken.py:2)"),
        ("pkg_t.wrong_link:Top", "Low.link(Top): Low does not depend on Top (it depends on nothing)"),
        ("pkg_t", "pkg_t has no service"),
    ],
)
def test_what_is_wrong_with_a_target(directory: Path, target: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_target(target, directory)
    assert message in str(caught.value)
