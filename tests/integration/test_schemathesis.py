"""Schemathesis on our own /openapi.json, against the server over HTTP and a model that computes: no 5xx, no status or
body or event of a stream that the document does not tell of, nothing taken that it calls wrong."""

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest
from answers_world import MODEL, world

from stator.frontend.server import FrontendServer

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
)
MIN_CASES = 1200
"""So that a run which found nothing to do is not taken for a good one."""


@pytest.mark.timeout(180)
def test_the_server_is_as_its_document_says(tmp_path: Path) -> None:
    async def main() -> tuple[int, str, str]:
        async with world() as made:
            server = FrontendServer(made.app, host="127.0.0.1", port=0)
            await server.start()
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "schemathesis.cli", "run"),
                    f"http://127.0.0.1:{server.port}/openapi.json",
                    *("--phases", "coverage,fuzzing", "--max-examples", "10", "--seed", "1", "--workers", "1"),
                    *("--checks", ",".join(CHECKS), "--exclude-method", "HEAD"),
                    *("--generation-database", "none", "--no-color"),
                    cwd=tmp_path,
                    env={
                        **os.environ,
                        "PYTHONPATH": str(Path(__file__).parent),
                        "SERVED_MODEL": MODEL,
                        "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
                    },
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )
                output, _ = await process.communicate()
            finally:
                await server.stop()
            assert process.returncode is not None
            return process.returncode, output.decode(), made.app._metrics.render().decode()

    code, output, metrics = asyncio.run(main())
    assert code == 0, output
    passed = re.search(r"(\d+) generated, \1 passed", output)
    assert passed is not None and int(passed[1]) >= MIN_CASES, output
    for endpoint in (
        "chat",
        "completions",
        "responses",
        "messages",
        "count_tokens",
        "embeddings",
        "tokenize",
        "detokenize",
    ):
        assert re.search(rf'stator_requests_total{{code="200",endpoint="{endpoint}"', metrics), output
