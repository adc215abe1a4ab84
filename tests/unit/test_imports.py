"""Imports point inward, and nothing unpickles. Read from the source, so that an import inside a function counts too."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = ROOT / "src" / "stator"

SHELLS = ("frontend", "processor", "router", "worker", "planner", "dashboard")
IMPURE = {"asyncio", "socket", "time", "random", "os", "threading", "logging", "subprocess", "selectors", "ssl"}
UNSAFE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle"}


def python_files(*directories: Path) -> list[Path]:
    return sorted(path for directory in directories for path in directory.rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module by its full name, `from a import b` as `a.b`, with the line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def offences(directory: Path, allowed: tuple[str, ...], forbidden: set[str] | None = None) -> list[str]:
    """Imports of stator modules that are not allowed, and of the forbidden others."""
    found: list[str] = []
    for path in python_files(directory):
        for module, line in imports(path):
            top = module.split(".")[0]
            inward = top != "stator" or within(module, allowed)
            if not inward or (forbidden and top in forbidden):
                found.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    return found


def test_imports_are_absolute() -> None:
    assert [p for p in python_files(SOURCE) for module, _ in imports(p) if module.startswith(".")] == []


def test_core_is_pure() -> None:
    allowed = ("stator.core", "stator.ids", "stator.messages", "stator.errors")
    found = offences(SOURCE / "core", allowed, IMPURE - {"random"})
    found += [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files(SOURCE / "core")
        for module, line in imports(path)
        if module.split(".")[0] == "random" and module != "random.Random"
    ]
    assert found == []


def test_messages_know_only_ids_and_errors() -> None:
    allowed = ("stator.messages", "stator.ids", "stator.errors")
    assert offences(SOURCE / "messages", allowed, IMPURE) == []
    for path in python_files(SOURCE / "messages"):
        others = {module.split(".")[0] for module, _ in imports(path)} - {"stator", "msgspec"}
        assert others <= {"array", "collections", "dataclasses", "enum", "functools", "operator", "sys", "typing"}, path


def test_shells_do_not_know_each_other() -> None:
    found: list[str] = []
    for shell in SHELLS:
        others = tuple(f"stator.{other}" for other in SHELLS if other != shell)
        for path in python_files(SOURCE / shell):
            found += [f"{path.relative_to(ROOT)}:{line}: {m}" for m, line in imports(path) if within(m, others)]
    assert found == []


@pytest.mark.parametrize("seam", ["transport", "discovery", "queue", "engines"])
def test_seams_know_no_shell_and_no_graph(seam: str) -> None:
    outward = (*(f"stator.{shell}" for shell in SHELLS), "stator.graph", "stator.cli")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files(SOURCE / seam)
        for module, line in imports(path)
        if within(module, outward)
    ]
    assert found == []


@pytest.mark.parametrize("package", ["graph", "config", "runtime", "hub", "observability", "cli"])
def test_what_runs_services_knows_none_of_them(package: str) -> None:
    outward = tuple(f"stator.{shell}" for shell in SHELLS) + ("stator.engines.local",)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files(SOURCE / package)
        for module, line in imports(path)
        if within(module, outward)
    ]
    assert found == []


def test_the_product_does_not_import_its_test_tools() -> None:
    tools = ("stator.testing", "pytest", "hypothesis")
    found = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path in python_files(SOURCE)
        if not path.is_relative_to(SOURCE / "testing")
        for module, line in imports(path)
        if within(module, tools)
    ]
    assert found == []


def unsafe_calls(module: ast.Module) -> Iterator[tuple[str, int]]:
    loaders = {("yaml", "load"), ("yaml", "unsafe_load"), ("torch", "load")}
    for node in ast.walk(module):
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in loaders:
                yield f"{owner}.{name}", node.lineno
            case ast.keyword(arg="allow_pickle", value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                yield "allow_pickle", value.lineno
            case _:
                pass


def test_nothing_unpickles_or_loads_unsafe_yaml() -> None:
    found: list[str] = []
    for path in python_files(*(ROOT / name for name in ("src", "examples", "tests", "benchmarks", "tools"))):
        found += [f"{path}:{line}: {module}" for module, line in imports(path) if module.split(".")[0] in UNSAFE]
        found += [f"{path}:{line}: {what}" for what, line in unsafe_calls(tree(path))]
    assert found == []


def test_every_test_compiles() -> None:
    for path in python_files(ROOT / "tests", ROOT / "examples"):
        compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True)
