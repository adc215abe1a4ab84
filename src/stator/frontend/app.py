"""The HTTP edge as an ASGI application: routes, small answers, and what becomes of a request that fails.

Raw ASGI: a framework's routing, request objects and per-chunk wrappers would cost more than the token path behind.
"""

import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import stator
from stator.errors import ErrorCode, StatorError
from stator.frontend.anthropic import (
    ANTHROPIC_ERRORS,
    COUNT_TOKENS_DIALECT,
    COUNT_TOKENS_PATH,
    MESSAGES_DIALECT,
    MESSAGES_PATH,
)
from stator.frontend.bodies import Bodies
from stator.frontend.decisions import DECISION_PREFIX, DecisionView
from stator.frontend.embeddings import EMBEDDINGS_ENDPOINT
from stator.frontend.generate import Generation, Targets
from stator.frontend.health import HealthReport
from stator.frontend.http import HttpExchange, Receive, Scope, Send, encode_json, internal_error
from stator.frontend.openai_dialect import CHAT_DIALECT, COMPLETIONS_DIALECT
from stator.frontend.openapi import document_json
from stator.frontend.response_store import ResponseKeeper
from stator.frontend.responses import PATH as RESPONSES_PATH
from stator.frontend.responses import PREFIX as RESPONSES_PREFIX
from stator.frontend.responses import KeptResponses, ResponsesDialect
from stator.frontend.settings import FrontendSettings
from stator.frontend.unary import DETOKENIZE, TOKENIZE
from stator.messages.openai import ModelCard, ModelList
from stator.observability.metrics import CONTENT_TYPE, Metrics
from stator.transport.base import TransportClient

logger = logging.getLogger(__name__)

MODEL_PREFIX = "/v1/models/"
MAX_ECHOED_CHARS = 200

Respond = Callable[[HttpExchange], Awaitable[None]]


class FrontendApp:
    """client, targets: how to call a Processor. models: what `/v1/models` lists, and the models that metrics name.

    health: asked by each `/health`. All three callables must be quick; they run on the event loop.
    scrape: what `/metrics` answers; default `metrics` alone, which a frontend of several processes adds to.
    of_model: finds the Processors that serve a model, if those of targets do not serve all. everywhere: all that there
    are, of any model; default: targets.
    """

    def __init__(
        self,
        *,
        client: TransportClient,
        targets: Targets,
        models: Callable[[], Sequence[ModelCard]],
        health: Callable[[], HealthReport],
        metrics: Metrics,
        scrape: Callable[[], Awaitable[bytes]] | None = None,
        settings: FrontendSettings | None = None,
        rng: random.Random | None = None,
        wall: Callable[[], float] = time.time,
        of_model: Callable[[str], Targets] | None = None,
        everywhere: Targets | None = None,
        responses: ResponseKeeper | None = None,
    ) -> None:
        self._models = models
        self._health = health
        self._metrics = metrics
        self._scrape = scrape
        self._rng = rng if rng is not None else random.Random()
        bounds = settings if settings is not None else FrontendSettings()
        self._bodies = Bodies(bounds.max_arriving_bodies, bounds.max_bodies_bytes)
        self.generation = Generation(
            client=client,
            targets=targets,
            models=models,
            metrics=metrics,
            settings=settings if settings is not None else FrontendSettings(),
            rng=self._rng,
            wall=wall,
            of_model=of_model,
        )
        self._explain = DecisionView(client, targets if everywhere is None else everywhere)
        keeper = ResponseKeeper(settings) if responses is None else responses
        self._kept_responses = KeptResponses(keeper)
        max_bytes = (settings or FrontendSettings()).max_body_bytes
        responses_dialect = ResponsesDialect(keeper, max_bytes=max_bytes, wall=wall)
        self._routes: dict[str, tuple[str, Respond]] = {
            "/v1/embeddings": ("POST", lambda http: self.generation.handle(http, EMBEDDINGS_ENDPOINT)),
            "/v1/chat/completions": ("POST", lambda http: self.generation.handle(http, CHAT_DIALECT)),
            "/v1/completions": ("POST", lambda http: self.generation.handle(http, COMPLETIONS_DIALECT)),
            MESSAGES_PATH: ("POST", lambda http: self.generation.handle(http, MESSAGES_DIALECT)),
            COUNT_TOKENS_PATH: ("POST", lambda http: self.generation.handle(http, COUNT_TOKENS_DIALECT)),
            RESPONSES_PATH: ("POST", lambda http: self.generation.handle(http, responses_dialect)),
            "/tokenize": ("POST", lambda http: self.generation.handle(http, TOKENIZE)),
            "/detokenize": ("POST", lambda http: self.generation.handle(http, DETOKENIZE)),
            "/v1/models": ("GET", self._list_models),
            "/health": ("GET", self._report_health),
            "/live": ("GET", self._report_live),
            "/metrics": ("GET", self._report_metrics),
            "/version": ("GET", self._report_version),
            "/openapi.json": ("GET", self._describe),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"only HTTP is served here, not {scope['type']}")
        http = HttpExchange(scope, receive, send, self._rng, self._bodies)
        if http.path.startswith(MESSAGES_PATH):
            http.errors = ANTHROPIC_ERRORS
        try:
            await self._route(http)
        except StatorError as error:
            await http.fail(error, _allow(error, self._method_of(http.path)))
        except Exception:
            logger.exception("request %s failed in the frontend", http.call_id)
            await http.fail(internal_error())
        finally:
            http.close()

    def _method_of(self, path: str) -> str | None:
        """The method that a path is served under; None for an unknown path."""
        known = self._routes.get(path)
        if known is not None:
            return known[0]
        return (
            "GET"
            if any(path.startswith(p) and path != p for p in (MODEL_PREFIX, DECISION_PREFIX, RESPONSES_PREFIX))
            else None
        )

    async def _route(self, http: HttpExchange) -> None:
        if http.path.startswith(RESPONSES_PREFIX):
            await self._kept_responses.handle(http)
            return
        method = self._method_of(http.path)
        if method is None:
            raise StatorError(ErrorCode.NOT_FOUND, f"There is nothing at {_echo(http.path)}.")
        if http.method != method and not (http.method == "HEAD" and method == "GET"):
            raise StatorError(
                ErrorCode.METHOD_NOT_ALLOWED, f"{_echo(http.path)} takes {method}, not {_echo(http.method)}."
            )
        known = self._routes.get(http.path)
        if known is not None:
            await known[1](http)
        elif http.path.startswith(DECISION_PREFIX):
            await http.respond(200, await self._explain(http))
        else:
            await self._show_model(http)

    async def _list_models(self, http: HttpExchange) -> None:
        await http.respond(200, encode_json(ModelList(list(self._models()))))

    async def _show_model(self, http: HttpExchange) -> None:
        name = http.path.removeprefix(MODEL_PREFIX)
        cards = self._models()
        for card in cards:
            if card.id == name:
                await http.respond(200, encode_json(card))
                return
        served = ", ".join(card.id for card in cards) or "none"
        raise StatorError(
            ErrorCode.MODEL_NOT_FOUND,
            f"The model {_echo(name)} is not served here; served models: {served}.",
            param="model",
        )

    async def _report_health(self, http: HttpExchange) -> None:
        report = self._health()
        draining = self.generation.draining
        ready = report.ready and not draining
        body: dict[str, Any] = {
            "status": "draining" if draining else "ready" if ready else "unavailable",
            "reasons": ["this server is shutting down", *report.reasons] if draining else report.reasons,
            "models": report.models,
            "pairing_refusals": report.pairing_refusals,
        }
        if report.namespaces:
            body["namespaces"] = report.namespaces
        await http.respond(200 if ready else 503, encode_json(body))

    async def _report_live(self, http: HttpExchange) -> None:
        await http.respond(200, b'{"status":"live"}')

    async def _report_metrics(self, http: HttpExchange) -> None:
        text = self._metrics.render() if self._scrape is None else await self._scrape()
        await http.respond(200, text, CONTENT_TYPE.encode("ascii"))

    async def _report_version(self, http: HttpExchange) -> None:
        await http.respond(200, encode_json({"version": stator.__version__}))

    async def _describe(self, http: HttpExchange) -> None:
        await http.respond(200, document_json())


def _allow(error: StatorError, method: str | None) -> list[tuple[bytes, bytes]]:
    if error.code is not ErrorCode.METHOD_NOT_ALLOWED:
        return []
    return [(b"allow", b"GET, HEAD" if method == "GET" else b"POST")]


def _echo(text: str) -> str:
    """A caller's text inside a message: quoted, without control characters, of bounded length."""
    return repr(text if len(text) <= MAX_ECHOED_CHARS else text[:MAX_ECHOED_CHARS] + "...")
