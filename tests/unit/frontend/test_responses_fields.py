"""No field of OpenAI's Responses schema is silently ignored: the table has them all, and requests go by it."""

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import ResponseIncludable, response_create_params
from openai.types.shared_params import reasoning

from stator.errors import StatorError
from stator.frontend.responses_request import ItemIds, chat_request, decode_responses, read_input
from stator.messages.openai_fields import Effect, Field
from stator.messages.responses import ReasoningConfig, ResponsesRequest
from stator.messages.responses_fields import HARMLESS, INCLUDABLE, PASSED_ON, RESPONSES_FIELDS

# Of openai 3.57.0: the keys of ResponseCreateParamsBase in types/responses/response_create_params.py, and `stream`.
OPENAI = {
    "access_programs", "background", "background_options", "context_management", "conversation", "image", "include",
    "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "model", "moderation",
    "parallel_tool_calls", "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "stream", "stream_options",
    "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
}  # fmt: skip

ASKS: dict[str, Any] = {
    "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "explicit"}, "truncation": "auto",
    "background": True, "background_options": {"completion_window": "2h"}, "service_tier": "flex",
    "conversation": "conv_1", "context_management": [{"type": "compaction"}], "prompt": {"id": "p"},
    "moderation": {"model": "m"}, "image": {"context_compression": "enabled"},
    "access_programs": {"cyber": "daybreak_red"}, "stream_options.include_obfuscation": True, "text.verbosity": "low",
    "reasoning.summary": "detailed", "reasoning.generate_summary": "concise", "reasoning.context": "all_turns",
    "reasoning.mode": "pro", "input.content.prompt_cache_breakpoint": {"mode": "explicit"},
    "input.encrypted_content": "x", "input.caller": {"type": "program", "caller_id": "c"}, "input.namespace": "n",
    "input.async": True, "tools.defer_loading": True, "tools.allowed_callers": ["programmatic"],
    "tools.output_schema": {}, "tools.async": True,
}  # fmt: skip


def roots(*, extensions: bool = True) -> set[str]:
    return {each.name.split(".")[0] for each in RESPONSES_FIELDS if extensions or not each.extension}


def translate(body: dict[str, Any]) -> Any:
    request = decode_responses(json.dumps({"model": "m", "input": "hi", **body}).encode())
    return chat_request(request, read_input(request.input, ItemIds("0" * 48)))


def test_the_table_is_openais_schema() -> None:
    assert {*response_create_params.ResponseCreateParamsBase.__annotations__, "stream"} == OPENAI
    assert roots(extensions=False) == OPENAI
    assert len({each.name for each in RESPONSES_FIELDS}) == len(RESPONSES_FIELDS)
    assert set(get_args(ResponseIncludable)) == INCLUDABLE
    assert set(reasoning.Reasoning.__annotations__) == set(ReasoningConfig.__struct_fields__)


def test_every_field_of_the_table_is_decoded_and_none_besides() -> None:
    assert set(ResponsesRequest.__struct_fields__) == roots()
    assert set(PASSED_ON) <= roots() - set(HARMLESS)


def body_with(name: str, value: Any) -> tuple[dict[str, Any], str]:
    """A body that has a field of the table, and the path under which the field is named."""
    head, _, rest = name.partition(".")
    if head == "tools":
        return {"tools": [{"type": "function", "name": "f", "parameters": {}, rest: value}]}, f"tools[0].{rest}"
    if head == "input" and rest.startswith("content."):
        part = {"type": "input_text", "text": "x", rest.removeprefix("content."): value}
        return {"input": [{"role": "user", "content": [part]}]}, f"input[0].content[0].{rest.removeprefix('content.')}"
    if head == "input":
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", rest: value}
        return {"input": [call]}, f"input[0].{rest}"
    more = {"stream": True} if head == "stream_options" else {}
    return {head: {rest: value} if rest else value, **more}, name


@pytest.mark.parametrize(
    "field", [each for each in RESPONSES_FIELDS if each.effect is Effect.REFUSED], ids=lambda each: each.name
)
def test_every_refused_field_is_refused_by_its_name_unless_it_asks_for_nothing(field: Field) -> None:
    body, path = body_with(field.name, ASKS[field.name])
    with pytest.raises(StatorError) as refused:
        translate(body)
    assert (refused.value.param, refused.value.info.status) == (path, 400)
    assert path in refused.value.message
    for value in (None, *field.harmless):
        if field.name != "stream_options.include_obfuscation" or value is not None:
            translate(body_with(field.name, value)[0])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=5) | st.sampled_from(["type", "role", "content", "id", "name", "call_id", "output"]),
            inner | st.sampled_from(["message", "user", "function", "function_call", "reasoning", "item_reference"]),
            max_size=5,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(roots() - {"model"})), VALUES, max_size=4))
def test_any_value_of_any_field_passes_or_is_refused_by_the_name_of_a_field(fields: dict[str, Any]) -> None:
    try:
        translate(fields)
    except StatorError as error:
        assert error.info.status == 400
        assert error.param is not None and error.param.replace("[", ".").split(".")[0] in roots()
