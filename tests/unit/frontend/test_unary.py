"""/tokenize and /detokenize at the Frontend: what reaches the Processor, and what becomes of its one item."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from frontend_fakes import MODEL, Answer, Fixture, ask, frontend

from stator.errors import ErrorCode, StatorError
from stator.frontend.settings import FrontendSettings
from stator.messages.openai import ModelCard
from stator.messages.tokenize import Tokenized, TokenizeRequest
from stator.messages.tokens import pack
from stator.transport import Call


def answer_with(*items: Any) -> Callable[[Call], None]:
    def script(call: Call) -> None:
        call.items(list(items))
        call.end()

    return script


three = answer_with(Tokenized(pack([7, 8, 9]), 2048))


def run(
    test: Callable[[Fixture], Awaitable[None]],
    script: Callable[[Call], None] = three,
    settings: FrontendSettings | None = None,
) -> None:
    async def main() -> None:
        async with frontend(script, settings) as fe:
            await test(fe)
            assert fe.app.generation.num_open == 0

    asyncio.run(main())


def post(fe: Fixture, path: str = "/tokenize", **fields: Any) -> Awaitable[Answer]:
    return ask(fe.app, "POST", path, json.dumps({"model": MODEL, **fields}).encode())


def test_the_body_is_vllms_and_the_request_counts_among_the_others():
    async def test(fe: Fixture) -> None:
        answer = await post(fe, prompt="abc", use_beam_search=1)
        assert answer.status == 200 and answer.headers["x-request-id"]
        assert answer.json == {"count": 3, "max_model_len": 2048, "tokens": [7, 8, 9], "token_strs": None}
        (call,) = fe.calls
        assert call.request == TokenizeRequest(model=MODEL, prompt="abc")
        counted = f'stator_requests_total{{code="200",endpoint="tokenize",model="{MODEL}"}} 1.0'
        assert counted in fe.metrics.render().decode()

    run(test)


def test_the_vocabularys_spelling_comes_along():
    async def test(fe: Fixture) -> None:
        assert (await post(fe, prompt="ab", return_token_strs=True)).json["token_strs"] == ["a", "Ġb"]

    run(test, answer_with(Tokenized(pack([1, 2]), 8, ["a", "Ġb"])))


def test_what_the_processor_refuses_is_refused_in_its_words():
    async def test(fe: Fixture) -> None:
        answer = await post(fe, prompt="a")
        assert answer.status == 400
        assert (answer.error["param"], answer.error["message"]) == ("prompt", "wrong")

    run(test, lambda call: call.end(StatorError(ErrorCode.INVALID_REQUEST, "wrong", param="prompt")))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", b"", None),
        ("/tokenize", b"[]", None),
        ("/tokenize", b'{"prompt": 1}', "prompt"),
        ("/tokenize", b'{"prompt": ["a"]}', "prompt"),
        ("/tokenize", b'{"messages": [{"role": "user", "content": "a", "audio": {}}]}', "messages[0].audio"),
        ("/tokenize", b'{"prompt": "a", "chat_template_kwargs": {"a": 18446744073709551616}}', "chat_template_kwargs"),
        ("/detokenize", b"{}", "tokens"),
        ("/detokenize", b'{"tokens": [-1]}', "tokens[0]"),
        ("/detokenize", b'{"tokens": [4294967296]}', "tokens[0]"),
        ("/detokenize", b'{"tokens": "a"}', "tokens"),
    ],
)
def test_bodies_that_are_none_are_refused_here(path: str, body: bytes, param: str | None):
    async def test(fe: Fixture) -> None:
        answer = await ask(fe.app, "POST", path, body)
        assert (answer.status, answer.error["param"]) == (400, param)
        assert fe.calls == []

    run(test)


def test_a_body_that_is_too_large_is_refused():
    async def test(fe: Fixture) -> None:
        assert (await post(fe, prompt="a" * 200)).status == 413

    run(test, settings=FrontendSettings(max_body_bytes=100))


def test_the_model_may_be_left_out_only_where_there_is_one():
    async def test(fe: Fixture) -> None:
        assert (await ask(fe.app, "POST", "/tokenize", b'{"prompt": "a"}')).status == 200
        cards = [ModelCard("a", 1), ModelCard("b", 1)]
        fe.app.generation._models = lambda: cards
        answer = await ask(fe.app, "POST", "/tokenize", b'{"prompt": "a"}')
        assert (answer.status, answer.error["param"]) == (400, "model")
        assert "a, b" in answer.error["message"]

    run(test)


def test_a_processor_that_has_no_such_endpoint_is_no_secret():
    async def test(fe: Fixture) -> None:
        answer = await post(fe, "/detokenize", tokens=[1])
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert "/detokenize" in answer.error["message"] and "instance" not in answer.error["message"]

    run(test)


def test_a_server_that_drains_takes_none():
    async def test(fe: Fixture) -> None:
        fe.app.generation.drain()
        answer = await post(fe, prompt="a")
        assert answer.status == 503 and "retry-after" in answer.headers

    run(test)


def test_fields_that_nobody_knows_are_named_in_the_log(caplog: pytest.LogCaptureFixture):
    async def test(fe: Fixture) -> None:
        with caplog.at_level(logging.DEBUG, "stator.frontend.unary"):
            await post(fe, prompt="secret", other_vendors=1)
        assert "other_vendors" in caplog.text and "secret" not in caplog.text

    run(test)
