"""Which fields of OpenAI's schema ask for something that is not supported."""

import pytest
from frontend_fakes import chat_body, text_body

from stator.frontend.decode import CHAT, COMPLETIONS, decode_request
from stator.messages.openai import (
    UNSUPPORTED_UNLESS,
    ChatCompletionRequest,
    CompletionRequest,
    unsupported_field,
)


def test_every_listed_field_is_declared():
    declared = {*ChatCompletionRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert set(UNSUPPORTED_UNLESS) <= declared


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"n": None, "logit_bias": {}, "service_tier": "auto", "store": False, "user": "u", "metadata": {"a": "b"}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_what_asks_for_nothing(fields: dict[str, object]):
    assert unsupported_field(decode_request(CHAT, chat_body(**fields))) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "x"}),
        ("logit_bias", {"5": 1}),
    ],
)
def test_what_asks_for_something(name: str, value: object):
    assert unsupported_field(decode_request(CHAT, chat_body(**{name: value}))) == name


def test_completions_logprobs_of_zero_asks_for_the_chosen_tokens():
    assert unsupported_field(decode_request(COMPLETIONS, text_body(logprobs=0))) == "logprobs"


def test_obfuscation_is_named_by_its_path():
    body = chat_body(stream=True, stream_options={"include_obfuscation": True})
    assert unsupported_field(decode_request(CHAT, body)) == "stream_options.include_obfuscation"
