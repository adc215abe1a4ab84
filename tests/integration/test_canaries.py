"""What clients write is in no log line at the default level, and what the server's parts say of themselves in no
answer: through the product's Frontend, Processor, Router, workers and engines, however a request ends.
"""

import asyncio
import json
import logging
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from answers_world import MODEL, World, world
from deployment import Deployment, Node, run
from front import Front, fronted, seen, until

from stator.core.disagg import DisaggPolicy
from stator.frontend.app import FrontendApp
from stator.frontend.health import HealthReport
from stator.frontend.settings import FrontendSettings
from stator.messages.openai import ModelCard
from stator.observability.metrics import Metrics
from stator.transport import Target
from unit.frontend.frontend_fakes import Answer, AsgiClient

CANARY = "canary7f3a"
SECRET = "secret9c1b"
INTERNALS = f'{SECRET} in File "/opt/{SECRET}/engine.py", <Engine object at 0x7f00dead{SECRET}>'
SHOWS_INTERNALS = (SECRET, "Traceback", "0x7f", "/opt/", "/src/", ".py", "inproc://", "tcp://", "Error(", "<Engine")
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEADERS = {"x-session-id": CANARY, "authorization": f"Bearer {CANARY}", "cookie": CANARY}


def tool(**function: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {CANARY: {"enum": [CANARY]}}, "additionalProperties": False}
    return {
        "type": "function",
        "function": {"name": CANARY, "description": CANARY, "parameters": parameters} | function,
    }


def chat(**fields: Any) -> dict[str, Any]:
    common = {"user": CANARY, "cache_salt": CANARY, "metadata": {CANARY: CANARY}, "stop": [CANARY], CANARY: CANARY}
    return {"model": MODEL, "messages": [{"role": "user", "content": CANARY}], "max_tokens": 8, **common, **fields}


def text(**fields: Any) -> dict[str, Any]:
    body = chat(**{"prompt": CANARY, **fields})
    del body["messages"]
    return body


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": CANARY, "description": CANARY, "schema": value}}


ANSWERED: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, chat()),
    "stream": (CHAT, chat(stream=True)),
    "details": (CHAT, chat(n=2, logprobs=True, top_logprobs=2)),
    "text": (TEXT, text(echo=True)),
    "schema": (CHAT, chat(response_format=schema({"enum": [CANARY]}), max_tokens=40)),
    "forced tool": (CHAT, chat(tools=[tool()], tool_choice="required", max_tokens=100)),
    "template argument": (CHAT, chat(chat_template_kwargs={"enable_thinking": False})),
    "choice": (TEXT, text(structured_outputs={"choice": [CANARY]}, max_tokens=40)),
}
REFUSED: dict[str, tuple[str, Any]] = {
    "not JSON": (CHAT, f'{{"model": "{CANARY}'.encode()),
    "type": (CHAT, chat(temperature=CANARY)),
    "role": (CHAT, chat(messages=[{"role": CANARY, "content": CANARY}])),
    "range": (CHAT, chat(temperature=3)),
    "unsupported": (CHAT, chat(guided_json={CANARY: CANARY})),
    "model": (CHAT, chat(model=CANARY)),
    "path": (f"/v1/{CANARY}", chat()),
    "too long": (TEXT, text(prompt=f"{CANARY} " * 600)),
    "very long": (CHAT, chat(messages=[{"role": "user", "content": f"{CANARY} " * 30_000}])),
    "no object": (CHAT, chat(tools=[tool(parameters={"type": CANARY})], tool_choice="required")),
    "schema": (CHAT, chat(response_format=schema({"$ref": f"http://{CANARY}/"}))),
    "grammar": (CHAT, chat(structured_outputs={"grammar": f"start: {CANARY}"})),
    "regex": (CHAT, chat(structured_outputs={"regex": f"{CANARY}("})),
    "unknown type in a schema": (CHAT, chat(response_format=schema({"type": CANARY, "x": [CANARY]}))),
    "template argument": (CHAT, chat(chat_template_kwargs={CANARY: CANARY})),
    "bias": (CHAT, chat(logit_bias={CANARY: 1})),
}


async def send(app: FrontendApp, path: str, body: Any) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await AsgiClient(app).request("POST", path, data, headers=HEADERS)


def check_log(caplog: pytest.LogCaptureFixture) -> None:
    for record in caplog.records:
        logged = logging.Formatter("%(name)s %(message)s").format(record)
        assert CANARY not in logged, logged


def check_shows_nothing(body: bytes) -> None:
    for internal in SHOWS_INTERNALS:
        assert internal.encode() not in body, body


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def in_world(scene: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), world() as made:
            await scene(made)

    asyncio.run(main())


def test_answers_and_refusals_leave_nothing_in_the_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def scene(made: World) -> None:
        for name, (path, body) in ANSWERED.items():
            answer = await send(made.app, path, body)
            assert answer.status == 200, (name, answer.body)
        for name, (path, body) in REFUSED.items():
            answer = await send(made.app, path, body)
            assert answer.status in (400, 404), (name, answer.body)
            check_shows_nothing(answer.body)

    in_world(scene)
    assert sum(record.name == "stator.frontend.access" for record in caplog.records) == len(ANSWERED) + len(REFUSED) - 1
    check_log(caplog)
    # Of processes that were started for it.
    assert CANARY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_shows_nothing_of_itself(caplog: pytest.LogCaptureFixture, stream: bool) -> None:
    async def scene(made: World) -> None:
        def fail(chunks: Sequence[Any]) -> Any:
            raise RuntimeError(INTERNALS)

        made.workers[0].bench.engine._runner.step = fail  # type: ignore[attr-defined]
        for _ in range(2):
            answer = await send(made.app, CHAT, chat(stream=stream))
            assert answer.status >= 500
            check_shows_nothing(answer.body)

    in_world(scene)
    assert SECRET in caplog.text, "whoever runs the worker is told"
    check_log(caplog)


def test_a_processor_that_fails_shows_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    async def scene(made: World) -> None:
        def fail(*_: Any) -> Any:
            raise KeyError(INTERNALS)

        made.processor._check = fail  # type: ignore[method-assign]
        answer = await send(made.app, CHAT, chat())
        assert (answer.status, answer.error["code"]) == (500, "internal")
        check_shows_nothing(answer.body)

    in_world(scene)
    check_log(caplog)


def frontend_of(front: Front, d: Deployment, **settings: Any) -> FrontendApp:
    return FrontendApp(
        client=d.client,
        targets=lambda endpoint: [Target(front.server.addresses, endpoint)],
        models=lambda: [ModelCard("m", 1, 512)],
        health=lambda: HealthReport(True, [], {}),
        metrics=Metrics(),
        settings=FrontendSettings(**settings),
        rng=Random(1),
    )


def failing(node: Node) -> None:
    def fail() -> None:
        raise MemoryError(INTERNALS)

    node.runner.before_step = fail


def test_engines_that_crash_of_a_request_show_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with fronted(migration_wait_s=0.2) as (d, front):
            nodes = [await d.add_decode(DisaggPolicy()) for _ in range(2)]
            for node in nodes:
                failing(node)
            await seen(d, *nodes)
            answer = await send(frontend_of(front, d), TEXT, text(model="m"))
            assert answer.status >= 500
            check_shows_nothing(answer.body)

    run(scene)
    assert SECRET in caplog.text
    check_log(caplog)


def test_a_worker_that_is_lost_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with fronted(lease_ttl_s=1.0, migration_wait_s=0.1) as (d, front):
            node = await d.add_decode(DisaggPolicy())
            await seen(d, node)
            app = frontend_of(front, d)
            client = AsgiClient(app)
            body = json.dumps(text(model="m", max_tokens=400, stream=True, ignore_eos=True, stop=None)).encode()
            asking = asyncio.ensure_future(client.request("POST", TEXT, body, headers=HEADERS))
            await client.sent.wait()
            await node.die()
            answer = await asking
            assert "[DONE]" not in answer.events and answer.events[-1]["error"]["code"]
            check_shows_nothing(json.dumps(answer.events[-1]).encode())
            d.nodes.remove(node)
            await node.engine.stop()

    run(scene)
    check_log(caplog)


def test_a_slow_reader_leaves_nothing_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with fronted() as (d, front):
            node = await d.add_decode(DisaggPolicy())
            await seen(d, node)
            app = frontend_of(front, d, max_buffered_deltas=2, slow_reader_timeout_s=0.05)
            client = AsgiClient(app)
            body = json.dumps(text(model="m", max_tokens=400, stream=True, ignore_eos=True, stop=None)).encode()
            client.gate.clear()
            asking = asyncio.ensure_future(client.request("POST", TEXT, body, headers=HEADERS))
            await client.blocked.wait()
            stream = next(iter(app.generation._streams))
            await until(lambda: stream._ended)
            client.gate.set()
            answer = await asking
            assert answer.events[-1]["error"]["code"] == "slow_reader"

    run(scene)
    check_log(caplog)
