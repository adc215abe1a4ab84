"""Every bound on a body that holds whatever the model is: refused by name, and the Processor hears nothing of it."""

import asyncio
import json
import random
from typing import Any

import pytest
from frontend_fakes import MODEL, ask, chat_body, frontend, text_body
from hypothesis import given, settings
from hypothesis import strategies as st

from stator.frontend import bounds
from stator.frontend.decode import MAX_DEPTH
from stator.frontend.settings import FrontendSettings
from stator.messages.openai import ChatCompletionRequest, CompletionRequest

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x", **fields}]}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": value}}


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f", **function}}]}


PART = {"type": "text", "text": "x"}
BEYOND: list[tuple[str, dict[str, Any], str]] = [
    (CHAT_PATH, {"model": "m" * (bounds.MAX_MODEL_CHARS + 1)}, "model"),
    (TEXT_PATH, {"model": "m" * (bounds.MAX_MODEL_CHARS + 1)}, "model"),
    (CHAT_PATH, {"messages": message()["messages"] * (bounds.MAX_MESSAGES + 1)}, "messages"),
    (CHAT_PATH, message(content=[PART] * (bounds.MAX_CONTENT_PARTS + 1)), "messages[0].content"),
    (CHAT_PATH, message(tool_calls=[{}] * (bounds.MAX_CALLS + 1)), "messages[0].tool_calls"),
    (CHAT_PATH, message(name="n" * (bounds.MAX_NAME_CHARS + 1)), "messages[0].name"),
    (TEXT_PATH, {"prompt": ["x"] * (bounds.MAX_PROMPTS + 1)}, "prompt"),
    (TEXT_PATH, {"prompt": [[1]] * (bounds.MAX_PROMPTS + 1)}, "prompt"),
    (CHAT_PATH, {"metadata": {str(key): "v" for key in range(bounds.MAX_METADATA + 1)}}, "metadata"),
    (CHAT_PATH, {"metadata": {"k" * (bounds.MAX_METADATA_KEY_CHARS + 1): "v"}}, "metadata"),
    (CHAT_PATH, {"metadata": {"k": "v" * (bounds.MAX_METADATA_VALUE_CHARS + 1)}}, "metadata"),
    *[
        (CHAT_PATH, {name: "x" * (bounds.MAX_LABEL_CHARS + 1)}, name)
        for name in ("user", "cache_salt", "safety_identifier", "prompt_cache_key")
    ],
    (TEXT_PATH, {"user": "x" * (bounds.MAX_LABEL_CHARS + 1)}, "user"),
    *[
        (CHAT_PATH, {name: "x" * (bounds.MAX_WORD_CHARS + 1)}, name)
        for name in ("reasoning_effort", "service_tier", "verbosity", "prompt_cache_retention")
    ],
    (CHAT_PATH, tool(parameters=nested(MAX_DEPTH + 1)), "tools[0].function.parameters"),
    (CHAT_PATH, message(tool_calls=[nested(MAX_DEPTH + 1)]), "messages[0].tool_calls"),
    (CHAT_PATH, {"response_format": schema(nested(MAX_DEPTH + 1))}, "response_format.json_schema.schema"),
    (TEXT_PATH, {"structured_outputs": {"json": nested(MAX_DEPTH + 1)}}, "structured_outputs.json"),
    (CHAT_PATH, {"chat_template_kwargs": nested(MAX_DEPTH + 1)}, "chat_template_kwargs"),
    (CHAT_PATH, tool(parameters={"a": 2**63}), "tools[0].function.parameters"),
    (CHAT_PATH, {"seed": 2**63}, "seed"),
    (CHAT_PATH, {"max_tokens": 10**400}, "max_tokens"),
    (TEXT_PATH, {"prompt": [2**32]}, "prompt[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fields", "param"), BEYOND, ids=[each[2] for each in BEYOND])
def test_a_body_beyond_a_bound_is_refused_by_name(path: str, fields: dict[str, Any], param: str):
    body = chat_body(**fields) if path == CHAT_PATH else text_body(**fields)

    async def run() -> None:
        async with frontend() as fe:
            answer = await ask(fe.app, "POST", path, body)
            assert not fe.calls
        assert (answer.status, answer.error["param"]) == (400, param)
        assert answer.error["code"] == "invalid_request"
        assert len(answer.body) < 1000, "what was too large is not sent back"

    asyncio.run(run())


WITHIN: list[tuple[str, dict[str, Any]]] = [
    (CHAT_PATH, {"messages": message()["messages"] * bounds.MAX_MESSAGES}),
    (CHAT_PATH, message(content=[PART] * bounds.MAX_CONTENT_PARTS)),
    (CHAT_PATH, {"metadata": {f"{key:>{bounds.MAX_METADATA_KEY_CHARS}}": "v" * 512 for key in range(16)}}),
    (CHAT_PATH, {"user": "x" * bounds.MAX_LABEL_CHARS}),
    (CHAT_PATH, tool(parameters=nested(MAX_DEPTH - 1))),
    (TEXT_PATH, {"prompt": ["x"] * bounds.MAX_PROMPTS}),
    (TEXT_PATH, {"prompt": [1] * 10_000}),
]


@pytest.mark.parametrize(("path", "fields"), WITHIN)
def test_a_body_at_a_bound_is_taken(path: str, fields: dict[str, Any]):
    async def run() -> None:
        async with frontend() as fe:
            await ask(fe.app, "POST", path, chat_body(**fields) if path == CHAT_PATH else text_body(**fields))
            assert len(fe.calls) == 1

    asyncio.run(run())


RAW = [
    b'{"model":"org/tiny","messages":[{"role":"user","content":"\\ud800"}]}',
    b'{"model":"org/tiny","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    b'{"model":"org/tiny","messages":[{"role":"user","content":"\xc3"}]}',
    b'{"model":"org/tiny","messages":[{"role":"user","content":"\x00"}]}',
    b'{"model":"org/tiny","messages":[{"role":"user","content":"\\u0000"}]}',
    b'{"model":"org/tiny","model":"org/tiny","messages":[],"messages":[{"role":"user","content":"a"}]}',
    b'{"model":"org/tiny","messages":[],"temperature":1e999}',
    b'{"model":"org/tiny","messages":[],"temperature":-0.0,"seed":-0}',
    b'{"model":"org/tiny","messages":[],"temperature":NaN}',
    b'{"model":"org/tiny","messages":[],"seed":1e18}',
    b'{"model":"org/tiny","messages":[],"seed":' + b"9" * 5000 + b"}",
    b'{"model":"org/tiny","messages":[],"x":' + b"9" * 5000 + b"}",
    b'{"model":"org/tiny","messages":[],"x":1e' + b"9" * 5000 + b"}",
    b'{"model":"org/tiny","messages":[],"tools":[{"type":"function","function":{"name":"f","parameters":{"a":1e999}}}]}',
    b'{"model":"org/tiny","messages":[],"tools":[{"type":"function","function":{"name":"f","parameters":{"\\ud83d":1}}}]}',
    b'\xef\xbb\xbf{"model":"org/tiny","messages":[]}',
    '{"model":"org/tiny","messages":[]}'.encode("utf-16"),
    b'{"model":"org/tiny","messages":[]} {}',
    b'{"":{"":{"":' + b"[[[[" * 50 + b"]]]]" * 50 + b"}}}",
]


@pytest.mark.parametrize("path", [CHAT_PATH, TEXT_PATH])
def test_strange_json_is_taken_or_refused(path: str):
    async def run() -> None:
        async with frontend() as fe:
            for body in RAW:
                for variant in (body, body.replace(b'"messages"', b'"prompt"').replace(b"[]", b'"x"')):
                    answer = await ask(fe.app, "POST", path, variant)
                    assert answer.status in (200, 400), variant

    asyncio.run(run())


TEXTS = st.text(max_size=4) | st.sampled_from(["\x00", "\ud800", "\U0010ffff", "‮", "a" * 3000])
NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 2**64, 10**40, 1e308, -0.0])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "assistant", "tool", "king"])},
                optional={
                    "content": VALUES | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": VALUES})),
                    "tool_calls": st.lists(st.dictionaries(TEXTS, VALUES, max_size=2), max_size=2),
                    "name": TEXTS,
                },
            ),
            max_size=3,
        ),
        "prompt": VALUES | st.lists(NUMBERS, max_size=4),
        "tools": st.lists(
            st.fixed_dictionaries(
                {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS, "parameters": VALUES})}
            ),
            max_size=2,
        ),
        "response_format": st.fixed_dictionaries(
            {"type": st.sampled_from(["json_schema", "json_object", "x"])},
            optional={"json_schema": st.fixed_dictionaries({"name": TEXTS, "schema": VALUES})},
        ),
        "structured_outputs": st.dictionaries(st.sampled_from(["json", "regex", "choice", "grammar"]), VALUES),
        "metadata": st.dictionaries(TEXTS, TEXTS, max_size=3),
        "logit_bias": st.dictionaries(TEXTS, NUMBERS, max_size=2),
        "stop": VALUES,
        "model": TEXTS,
    },
)
NAMES = sorted({*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__})


def spelled(body: dict[str, Any], rng: random.Random) -> bytes:
    """As JSON, in one of several ways to write it, some of them wrong: keys twice, huge floats, raw surrogates."""
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.3 and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    if rng.random() < 0.2:
        text = text.replace("1", "1e400", 1)
    return text.encode("utf-8", "surrogatepass")


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([CHAT_PATH, TEXT_PATH]),
    SHAPED,
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    st.randoms(use_true_random=False),
)
def test_no_body_makes_the_server_fail(path: str, shaped: dict[str, Any], fields: dict[str, Any], rng: random.Random):
    whole = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "prompt": "a", **shaped, **fields}

    async def run() -> None:
        async with frontend(settings=FrontendSettings(max_open_requests=2)) as fe:
            for body in (spelled(whole, rng), spelled(fields, rng)):
                answer = await ask(fe.app, "POST", path, body)
                assert answer.status in (200, 400)
                if answer.status == 400:
                    assert len(answer.body) < 2000
                    assert "Traceback" not in answer.error["message"]

    asyncio.run(run())
