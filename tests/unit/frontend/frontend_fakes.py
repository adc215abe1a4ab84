"""A Processor that does what a test scripts, on the in-process carrier, and an ASGI client without a socket."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from stator.errors import Ending
from stator.frontend.app import FrontendApp
from stator.frontend.health import HealthReport, ModelHealth
from stator.frontend.settings import FrontendSettings
from stator.messages.embeddings import EmbeddingsRequest
from stator.messages.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    ModelCard,
    PromptTokensDetails,
    Usage,
)
from stator.messages.processor import CompletionDelta
from stator.messages.tokenize import TokenizeRequest
from stator.observability.metrics import Metrics
from stator.transport import (
    Call,
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
)

MODEL = "org/tiny"
USAGE = Usage(7, 3, 10, PromptTokensDetails(4))
CREATED = 1_700_000_000
TIMEOUT_S = 20.0


def chat_body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def text_body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "hi", **fields}).encode()


def delta(text: str, ending: Ending | None = None) -> CompletionDelta:
    return CompletionDelta(text=text, num_tokens=1, ending=ending, usage=USAGE if ending else None)


def say(*texts: str) -> Callable[[Call], None]:
    """A script: these texts in one go, then a normal end."""

    def script(call: Call) -> None:
        call.items([*(delta(text) for text in texts[:-1]), delta(texts[-1], Ending.STOP)])
        call.end()

    return script


say_hello = say("Hello", " world")


@dataclass
class Fixture:
    """script: what the Processor does with a call. calls: those it got, also as a queue to await the next one."""

    app: FrontendApp
    metrics: Metrics
    script: Callable[[Call], None]
    calls: list[Call] = field(default_factory=list[Call])
    arrivals: asyncio.Queue[Call] = field(default_factory=lambda: asyncio.Queue[Call]())
    cancelled: asyncio.Queue[Call] = field(default_factory=lambda: asyncio.Queue[Call]())
    health: HealthReport = field(default_factory=lambda: HealthReport(True, [], {MODEL: ModelHealth(1, 2)}))

    def handle(self, call: Call) -> None:
        self.calls.append(call)
        self.arrivals.put_nowait(call)
        call.on_cancel(lambda: self.cancelled.put_nowait(call))
        self.script(call)


@asynccontextmanager
async def frontend(
    script: Callable[[Call], None] = say_hello,
    settings: FrontendSettings | None = None,
    timeout_s: float = TIMEOUT_S,
) -> AsyncIterator[Fixture]:
    network = InProcessNetwork()
    server = RequestPlaneServer(Identity(), Listen(host=None, inproc_name="processor"), network=network)
    client = RequestPlaneClient(Identity(), network=network)
    metrics = Metrics()
    app = FrontendApp(
        client=client,
        targets=lambda endpoint: [Target(server.addresses, endpoint)] if server.addresses else [],
        models=lambda: [ModelCard(MODEL, CREATED, 2048)],
        health=lambda: fixture.health,
        metrics=metrics,
        settings=settings,
        rng=random.Random(1),
        wall=lambda: CREATED,
    )
    fixture = Fixture(app, metrics, script)
    server.register(Endpoint("chat", ChatCompletionRequest, fixture.handle))
    server.register(Endpoint("completions", CompletionRequest, fixture.handle))
    server.register(Endpoint("embeddings", EmbeddingsRequest, fixture.handle))
    server.register(Endpoint("count_tokens", ChatCompletionRequest, fixture.handle))
    server.register(Endpoint("tokenize", TokenizeRequest, fixture.handle))
    await server.start()
    try:
        async with asyncio.timeout(timeout_s):
            yield fixture
    finally:
        await client.close()
        await server.close()


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    bodies: list[bytes] = field(default_factory=list[bytes])
    complete: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"message", "type", "param", "code"}
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        return events_of(self.body)


def events_of(body: bytes) -> list[Any]:
    """Every server-sent event, decoded; the closing one as the string [DONE]."""
    assert body.endswith(b"\n\n")
    found: list[Any] = []
    for event in body[:-2].split(b"\n\n"):
        assert event.startswith(b"data: ")
        data = event.removeprefix(b"data: ")
        found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found


class AsgiClient:
    """One request. `gate`, while clear, blocks `send` as a client that reads nothing would; `leave` disconnects."""

    def __init__(self, app: FrontendApp) -> None:
        self._app = app
        self.answer = Answer()
        self.gate = asyncio.Event()
        self.gate.set()
        self.blocked = asyncio.Event()
        self.sent = asyncio.Event()
        self._gone = asyncio.Event()
        self._parts: list[tuple[bytes, bool]] = []

    def leave(self) -> None:
        self._gone.set()
        self.gate.set()

    async def _receive(self) -> dict[str, Any]:
        if self._parts:
            body, more = self._parts.pop(0)
            return {"type": "http.request", "body": body, "more_body": more}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if not self.gate.is_set():
            self.blocked.set()
            await self.gate.wait()
        if self._gone.is_set():
            return
        assert not self.answer.complete, "sent after the end"
        if message["type"] == "http.response.start":
            assert not self.answer.status, "two heads"
            self.answer.status = message["status"]
            self.answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            assert self.answer.status, "a body before the head"
            self.answer.bodies.append(message["body"])
            self.answer.complete = not message["more_body"]
        self.sent.set()

    async def request(
        self,
        method: str,
        path: str,
        *parts: bytes,
        headers: dict[str, str] | None = None,
        whole: bool = True,
        query: str = "",
    ) -> Answer:
        """whole False: the body's end never comes."""
        self._parts = [(part, not whole or index < len(parts) - 1) for index, part in enumerate(parts or (b"",))]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()],
        }
        await self._app(scope, self._receive, self._send)
        return self.answer


def ask(app: FrontendApp, method: str, path: str, *parts: bytes, **options: Any) -> Awaitable[Answer]:
    return AsgiClient(app).request(method, path, *parts, **options)
