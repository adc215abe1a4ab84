"""The load that goes on while something happens to the deployment."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prompts import PROMPTS
from reference import Reference

CLIENT = Path(__file__).with_name("steady_load.py")


@contextmanager
def steady_load(
    port: int, reference: Reference, *, at_once: int = 20, max_tokens: int = 24, **more: Any
) -> Iterator[dict[str, Any]]:
    """Runs while the block does; the report is in the dict afterwards. Fails if any answer was not the reference's."""
    bodies = [
        {"model": "tiny-llama", "messages": m, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        for m in PROMPTS
    ]
    expected = [reference.chat(messages, max_tokens).text for messages in PROMPTS]
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    plan = {"url": url, "bodies": bodies, "expected": expected, "at_once": at_once, **more}
    pipe = subprocess.PIPE
    report: dict[str, Any] = {}
    with subprocess.Popen([sys.executable, str(CLIENT)], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as client:
        assert client.stdin is not None and client.stderr is not None
        try:
            client.stdin.write(json.dumps(plan) + "\n")
            client.stdin.flush()
            assert client.stderr.readline() == "running\n"
            yield report
            out, errors = client.communicate(timeout=120)
        finally:
            client.kill()
    assert client.returncode == 0, errors
    report.update(json.loads(out))
    assert report["wrong"] == [], json.dumps(report["wrong"][:5], indent=1)
