"""No field of OpenAI's schema is silently ignored: the table has them all, and requests go by it."""

import asyncio
import logging
from typing import Any

import pytest
from frontend_fakes import ask, chat_body, frontend, text_body
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as text
from openai.types.chat import completion_create_params as chat

from stator.errors import ERRORS, StatorError
from stator.frontend.decode import CHAT, COMPLETIONS, decode_request, undeclared_fields
from stator.messages.openai import ChatCompletionRequest, CompletionRequest, is_plain, unsupported_field
from stator.messages.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, Effect, Field
from stator.processor import validation

NUM_IDS = 1000

# Of openai 3.57.0: the keys of CompletionCreateParamsBase in types/chat/completion_create_params.py and in
# types/completion_create_params.py, and `stream`.
OPENAI_CHAT = {
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "messages", "metadata", "modalities", "model", "moderation", "n", "parallel_tool_calls", "prediction",
    "presence_penalty", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort",
    "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options",
    "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
}  # fmt: skip
OPENAI_COMPLETIONS = {
    "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "model", "n", "presence_penalty",
    "prompt", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user",
}  # fmt: skip
OPENAI_STREAM_OPTIONS = {"include_obfuscation", "include_usage"}

ENDPOINTS = [
    (CHAT, CHAT_FIELDS, ChatCompletionRequest, OPENAI_CHAT),
    (COMPLETIONS, COMPLETION_FIELDS, CompletionRequest, OPENAI_COMPLETIONS),
]
BODIES = {CHAT: chat_body, COMPLETIONS: text_body}


def roots(fields: tuple[Field, ...], *, extensions: bool = True) -> set[str]:
    return {each.name.split(".")[0] for each in fields if extensions or not each.extension}


@pytest.mark.parametrize(("endpoint", "fields", "struct", "known"), ENDPOINTS)
def test_the_table_is_openais_schema(endpoint: str, fields: tuple[Field, ...], struct: Any, known: set[str]):
    assert len({each.name for each in fields}) == len(fields)
    assert roots(fields, extensions=False) == known
    options = {each.name for each in fields if each.name.startswith("stream_options.") and not each.extension}
    assert options == {f"stream_options.{name}" for name in OPENAI_STREAM_OPTIONS}


@pytest.mark.parametrize(("endpoint", "fields", "struct", "known"), ENDPOINTS)
def test_every_field_of_the_table_is_decoded_and_none_besides(
    endpoint: str, fields: tuple[Field, ...], struct: Any, known: set[str]
):
    declared = set(struct.__struct_fields__)
    # What both endpoints decode though only chat has it.
    assert roots(fields) <= declared <= roots(fields) | {"metadata"}


def test_the_list_is_that_of_the_installed_package():
    assert {*chat.CompletionCreateParamsBase.__annotations__, "stream"} == OPENAI_CHAT
    assert {*text.CompletionCreateParamsBase.__annotations__, "stream"} == OPENAI_COMPLETIONS


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"n": 4, "logit_bias": {"5": 1}, "service_tier": "auto", "store": False, "user": "u", "metadata": {"a": "b"}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"prompt_cache_key": "k", "prompt_cache_retention": "in_memory", "safety_identifier": "s"},
    ],
)
def test_what_passes(fields: dict[str, object]):
    assert unsupported_field(decode_request(CHAT, chat_body(**fields))) is None


_ASKS: dict[str, Any] = {
    "service_tier": "flex", "store": True, "functions": [{"name": "f"}], "function_call": {"name": "f"},
    "modalities": ["text", "audio"], "audio": {"voice": "x"}, "verbosity": "low",
    "prediction": {"type": "content", "content": "x"}, "moderation": {"model": "m"}, "web_search_options": {},
    "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit"}, "best_of": 2, "suffix": "x",
    "guided_json": {"type": "object"}, "guided_regex": "a+", "guided_choice": ["a"], "guided_grammar": "root ::= x",
}  # fmt: skip


@pytest.mark.parametrize(
    ("endpoint", "field"),
    [
        (endpoint, each)
        for endpoint, fields, _, _ in ENDPOINTS
        for each in fields
        if each.effect is Effect.REFUSED and "." not in each.name
    ],
    ids=lambda value: value.name if isinstance(value, Field) else value,
)
def test_every_refused_field_is_refused_by_its_name_unless_it_asks_for_nothing(endpoint: str, field: Field):
    make = BODIES[endpoint]
    assert unsupported_field(decode_request(endpoint, make(**{field.name: _ASKS[field.name]}))) == field.name
    for value in (None, *field.harmless):
        assert unsupported_field(decode_request(endpoint, make(**{field.name: value}))) is None


def test_obfuscation_is_named_by_its_path():
    body = chat_body(stream=True, stream_options={"include_obfuscation": True})
    assert unsupported_field(decode_request(CHAT, body)) == "stream_options.include_obfuscation"


@pytest.mark.parametrize("name", ["function_call", "audio", "refusal"])
def test_fields_of_messages_are_refused_by_path(name: str):
    value = "no" if name == "refusal" else {"id": "x"}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a", name: value}]
    with pytest.raises(StatorError) as refused:
        decode_request(CHAT, chat_body(messages=messages))
    assert refused.value.param == f"messages[1].{name}" and refused.value.info.status == 400
    decode_request(CHAT, chat_body(messages=[{**messages[1], name: None}]))


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_parts_that_are_no_text_are_refused_by_path(kind: str):
    content = [{"type": "text", "text": "see"}, {"type": kind, kind: {"url": "http://x"}}]
    with pytest.raises(StatorError) as refused:
        decode_request(CHAT, chat_body(messages=[{"role": "user", "content": content}]))
    assert refused.value.param == "messages[0].content[1].type"
    assert kind in refused.value.message and "'text'" in refused.value.message


def test_extensions_that_nobody_knows_are_named_once_for_the_log():
    body = chat_body(top_k=3, use_beam_search=True, **{"x" * 100: 1})
    request = decode_request(CHAT, body)
    assert undeclared_fields(request, body) == ["use_beam_search", "x" * 64]
    many = chat_body(**{f"f{n}": n for n in range(40)})
    assert len(undeclared_fields(decode_request(CHAT, many), many)) == 16


@pytest.mark.parametrize(
    ("endpoint", "fields", "plain"),
    [
        (CHAT, {}, True),
        (CHAT, {"n": 1, "logprobs": False, "stream": True, "stream_options": {"include_usage": True}}, True),
        (CHAT, {"n": 2}, False),
        (CHAT, {"logprobs": True}, False),
        (CHAT, {"return_token_ids": True}, False),
        (CHAT, {"stream": True, "stream_options": {"continuous_usage_stats": True}}, False),
        (CHAT, {"skip_special_tokens": False}, False),
        (COMPLETIONS, {"prompt": [1, 2]}, True),
        (COMPLETIONS, {"prompt": ["a"]}, False),
        (COMPLETIONS, {"logprobs": 0}, False),
        (COMPLETIONS, {"echo": True}, False),
    ],
)
def test_which_answers_are_made_the_quick_way(endpoint: str, fields: dict[str, Any], plain: bool):
    assert is_plain(decode_request(endpoint, BODIES[endpoint](**fields))) is plain


def admit(endpoint: str, body: bytes) -> None:
    """All checks of a request that need no tokenizer's text."""
    request = decode_request(endpoint, body)
    validation.check_model(request, ("org/tiny",))
    validation.check_supported(request)
    validation.check_ranges(request)
    validation.stop_strings(request)
    stops = validation.stop_token_ids(request, NUM_IDS)
    if isinstance(request, CompletionRequest):
        validation.prompts(request, NUM_IDS)
    max_tokens = validation.resolve_max_tokens(request, 10, 100)
    validation.sampling_params(
        request,
        defaults=validation.SamplingDefaults(),
        max_tokens=max_tokens,
        stop_ids=stops,
        draw_seed=lambda: 1,
        bias=validation.logit_bias(request, NUM_IDS),
        allowed_ids=validation.allowed_token_ids(request, NUM_IDS, {2}),
    )


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 200)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("5"), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize(("endpoint", "table"), [(CHAT, CHAT_FIELDS), (COMPLETIONS, COMPLETION_FIELDS)])
def test_any_value_of_any_field_passes_or_is_refused_by_the_name_of_a_field(endpoint: str, table: tuple[Field, ...]):
    names = sorted(roots(table) - {"model"})

    @settings(max_examples=400, deadline=None)
    @given(st.dictionaries(st.sampled_from(names), VALUES, max_size=4))
    @example({"stop": "a" * 300})
    @example({"min_tokens": 5, "max_tokens": 3})
    def check(fields: dict[str, Any]) -> None:
        try:
            admit(endpoint, BODIES[endpoint](**fields))
        except StatorError as error:
            assert ERRORS[error.code].status == 400
            assert error.param is not None
            assert error.param.replace("[", ".").split(".")[0] in roots(table)

    check()


def test_the_one_debug_line(caplog: pytest.LogCaptureFixture):
    async def run() -> None:
        async with frontend() as fe:
            await ask(fe.app, "POST", "/v1/chat/completions", chat_body(best_ever=True, other={}))

    with caplog.at_level(logging.DEBUG, "stator.frontend.generate"):
        asyncio.run(run())
    lines = [record.getMessage() for record in caplog.records if "not known" in record.getMessage()]
    assert len(lines) == 1 and "['best_ever', 'other']" in lines[0] and "hi" not in lines[0].split("ignored")[1]
    with caplog.at_level(logging.INFO, "stator.frontend.generate"):
        caplog.clear()
        asyncio.run(run())
    assert not [record for record in caplog.records if "not known" in record.getMessage()]
