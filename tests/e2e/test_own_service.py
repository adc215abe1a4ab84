"""The guide's own service, run exactly as the guide shows it."""

import re
import shutil
from pathlib import Path

import pytest
from processes import Serve
from test_graphs import Head

pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide" / "own-service.md"
NAMED = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The examples, and the files that the guide shows."""
    where = tmp_path / "llm"
    shutil.copytree(ROOT / "examples" / "llm", where, ignore=shutil.ignore_patterns("__pycache__"))
    files = NAMED.findall(GUIDE.read_text())
    assert [name for name, _ in files] == ["journal.py", "journal_graph.py"]
    for name, code in files:
        (where / name).write_text(code)
    return where


@pytest.mark.parametrize("colocate", [False, True])
def test_the_guides_service(directory: Path, tmp_path: Path, colocate: bool) -> None:
    flags = ["--Journal.keep=50", *(["--Journal.ServiceArgs.colocate=true"] if colocate else [])]
    head = Head("journal_graph.py", tmp_path, *flags, cwd=directory)
    reader = None
    try:
        chat = [{"role": "user", "content": "Hello"}]
        assert head.send([{"messages": chat, "max_tokens": 4, "stream": True}])[0]["error"] is None
        reader = Serve(
            ["serve", "journal:Reader", "--join", f"127.0.0.1:{head.hub_port}"], state_dir=tmp_path, cwd=directory
        )
        reader.wait_for(r"\[Reader:1\] tiny-llama: a chat of 1 messages")
        longer = [*chat, {"role": "assistant", "content": "Hi"}, *chat]
        assert head.send([{"messages": longer, "max_tokens": 4}])[0]["error"] is None
        reader.wait_for(r"\[Reader:1\] tiny-llama: a chat of 3 messages")
        starting = head.serve.wait_for(r"starting (.*); the hub").group(1)
        assert ("Journal:1" in starting) is not colocate
    finally:
        if reader is not None:
            assert reader.stop() == 0
        assert head.serve.stop() == 0
