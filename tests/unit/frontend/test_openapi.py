"""/openapi.json says what is served: its paths are the routes, its schemas take what is decoded."""

import asyncio
import json
from typing import Any

import pytest
from frontend_fakes import MODEL, ask, chat_body, frontend, text_body
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from stator.errors import ERRORS
from stator.frontend.openapi import document, document_json
from stator.messages.anthropic_fields import COUNT_FIELDS, MESSAGES_FIELDS
from stator.messages.embeddings import EMBEDDING_FIELDS
from stator.messages.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, Effect
from stator.messages.openai_limits import RANGES
from stator.messages.responses_fields import RESPONSES_FIELDS
from stator.messages.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS

DOCUMENT: dict[str, Any] = json.loads(document_json())
SCHEMAS = DOCUMENT["components"]["schemas"]
HARMLESS_FROM_ELSEWHERE = {"best_of"}


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]})


def takes(name: str, value: Any) -> bool:
    return validator(name).is_valid(value)


def chat(**fields: Any) -> Any:
    return json.loads(chat_body(**fields))


def text(**fields: Any) -> Any:
    return json.loads(text_body(**fields))


def test_the_document_is_valid_openapi():
    validate(DOCUMENT)


def test_the_paths_are_the_routes_and_every_method_of_them():
    async def run() -> None:
        async with frontend() as fe:
            served = {path: method for path, (method, _) in fe.app._routes.items()}
        described = {path: set(methods) for path, methods in DOCUMENT["paths"].items()}
        parts = {path for path in described if "{" in path}
        assert {path for path in parts if fe.app._method_of(path) == "GET"} == parts
        for path in parts:
            served[path] = "GET"
        described["/v1/responses/{id}"].remove("delete")
        assert described == {path: {"post"} if method == "POST" else {"get", "head"} for path, method in served.items()}

    asyncio.run(run())


def test_it_is_served_and_made_once():
    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "GET", "/openapi.json")
        assert answer.status == 200 and answer.json == DOCUMENT
        assert document_json() is document_json() and document() is not document()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        ("ChatCompletionRequest", CHAT_FIELDS),
        ("CompletionRequest", COMPLETION_FIELDS),
        ("EmbeddingsRequest", EMBEDDING_FIELDS),
        ("MessagesRequest", MESSAGES_FIELDS),
        ("CountTokensRequest", COUNT_FIELDS),
        ("ResponsesRequest", RESPONSES_FIELDS),
        ("TokenizeRequest", TOKENIZE_FIELDS),
        ("DetokenizeRequest", DETOKENIZE_FIELDS),
    ],
)
def test_every_field_is_described_and_a_refused_one_as_what_passes(schema: str, fields: Any):
    properties = SCHEMAS[schema]["properties"]
    names = {each.name.split(".")[0] for each in fields}
    # What both endpoints decode though only chat has it.
    assert names <= set(properties) <= names | {"metadata"}
    for each in fields:
        if each.effect is Effect.REFUSED and "." not in each.name and each.name not in HARMLESS_FROM_ELSEWHERE:
            assert properties[each.name]["enum"] == [None, *each.harmless]


@pytest.mark.parametrize("name", list(RANGES))
def test_ranges_are_those_that_are_checked(name: str):
    schema, make = ("ChatCompletionRequest", chat)
    if name in ("prompt_logprobs", "top_logprobs"):
        assert not takes(schema, make(**{name: 21}))
    limits = RANGES[name]
    assert takes(schema, make(**{name: None}))
    assert takes(schema, make(**{name: limits.low})) is not limits.low_excluded
    assert not takes(schema, make(**{name: limits.low - 1}))
    if limits.high != float("inf"):
        assert takes(schema, make(**{name: limits.high}))
        assert not takes(schema, make(**{name: limits.high + 1 if abs(limits.high) < 2**62 else limits.high * 4}))


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a"}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"prompt": [[1], [2, 3]]},
        {"prompt": "a", "max_tokens": 0, "echo": True}, {"prompt": "a", "logit_bias": {"5": 1}, "stop": ["a"]},
        {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}, "other_vendors": {"x": 1}},
    ],
)  # fmt: skip
def test_what_is_taken(body: dict[str, Any]):
    assert takes("CompletionRequest", {"model": MODEL, **body})


@pytest.mark.parametrize(
    "body",
    [
        {}, {"prompt": ""}, {"prompt": []}, {"prompt": [1, "a"]}, {"prompt": [[]]}, {"prompt": [-1]},
        {"prompt": "a", "logit_bias": {"x": 1}}, {"prompt": "a", "logit_bias": {"1": 101}}, {"prompt": "a", "n": 0},
        {"prompt": "a", "stop": "x" * 257}, {"prompt": "a", "stop": ["x"] * 17}, {"prompt": "a", "suffix": "x"},
        {"prompt": "a", "logprobs": 21}, {"prompt": "a", "cache_salt": ""}, {"prompt": "a", "max_tokens": -1},
    ],
)  # fmt: skip
def test_what_is_refused(body: dict[str, Any]):
    assert not takes("CompletionRequest", {"model": MODEL, **body})


def test_fields_inside_are_described_too():
    assert takes("ChatCompletionRequest", chat(stream=True, stream_options={"include_obfuscation": False}))
    assert not takes("ChatCompletionRequest", chat(stream=True, stream_options={"include_obfuscation": True}))
    assert not takes("ChatCompletionRequest", chat(messages=[]))
    assert not takes("ChatCompletionRequest", chat(messages=[{"role": "user", "content": "a", "audio": {"id": "x"}}]))
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert not takes("ChatCompletionRequest", chat(messages=[{"role": "user", "content": [image]}]))


@pytest.mark.parametrize("path", list(DOCUMENT["paths"]))
def test_statuses_are_those_of_the_table_of_errors(path: str):
    known = {info.status for info in ERRORS.values()} | {200, 431} | ({529} if "messages" in path else set())
    for operation in DOCUMENT["paths"][path].values():
        statuses = {int(status) for status in operation["responses"]}
        assert {200, 400, 408, 431, 500} <= statuses <= known
        if path.startswith("/v1/c"):
            assert statuses == {200, 400, 404, 408, 413, 429, 431, 500, 502, 503, 504}


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v1/models", "ModelList"), (f"/v1/models/{MODEL}", "ModelCard"), ("/health", "Health"),
        ("/live", "Liveness"), ("/version", "Version"), ("/v1/models/x", "ErrorResponse"),
    ],
)  # fmt: skip
def test_small_answers_are_as_described(path: str, schema: str):
    async def run() -> None:
        async with frontend() as fe:
            validator(schema).validate((await ask(fe.app, "GET", path)).json)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/chat/completions", "ChatCompletion"), ("/v1/completions", "TextCompletion")]
)
def test_answers_and_their_chunks_are_as_described(path: str, name: str):
    async def run() -> None:
        body = chat_body if "chat" in path else text_body
        async with frontend() as fe:
            validator(name).validate((await ask(fe.app, "POST", path, body())).json)
            validator("ErrorResponse").validate((await ask(fe.app, "POST", path, b"{")).json)
            usage = {"include_usage": True}
            events = (await ask(fe.app, "POST", path, body(stream=True, stream_options=usage))).events
        for event in events[:-1]:
            validator(f"{name}Chunk").validate(event)

    asyncio.run(run())


def test_embeddings_are_as_described():
    assert takes("EmbeddingsRequest", {"model": MODEL, "input": [[1], [2]], "encoding_format": "base64"})
    for wrong in ("", [], [[]], ["a", 1], None, [-1], ["a"] * 2049):
        assert not takes("EmbeddingsRequest", {"model": MODEL, "input": wrong})
    for shown in ([0.5], "AAAAPw=="):
        data = [{"object": "embedding", "index": 0, "embedding": shown}]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        validator("EmbeddingList").validate({"object": "list", "data": data, "model": MODEL, "usage": usage})
