"""Every bound that the Processor sets: refused by name, and neither Router nor engine hears anything of it."""

import asyncio
from typing import Any

import pytest

from stator.core import json_schema, structured
from stator.core.tools import request as tools
from stator.messages import openai_limits as validation
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest
from stator.messages.tools import FunctionDefinition, JsonSchemaFormat, ResponseFormat, StructuredOutputs, Tool

from .harness import harness


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="tiny", messages=[ChatMessage("user", "x")], **fields)


def completion(prompt: Any = "x", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="tiny", prompt=prompt, **fields)


def with_schema(schema: dict[str, Any]) -> ChatCompletionRequest:
    return chat(response_format=ResponseFormat("json_schema", JsonSchemaFormat("s", schema)))


def with_tools(*functions: FunctionDefinition) -> ChatCompletionRequest:
    return chat(tools=[Tool("function", each) for each in functions], tool_choice="required")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def asked(**fields: Any) -> ChatCompletionRequest:
    return chat(structured_outputs=StructuredOutputs(**fields))


SCHEMA = "response_format.json_schema.schema"
BEYOND: list[tuple[Any, str]] = [
    (chat(n=validation.MAX_N + 1), "n"),
    (completion(["x"] * 5, n=validation.MAX_N), "n"),
    (completion(["x"] * (validation.MAX_CHOICES + 1)), "prompt"),
    (chat(logprobs=True, top_logprobs=validation.MAX_TOP_LOGPROBS + 1), "top_logprobs"),
    (completion(logprobs=validation.MAX_TOP_LOGPROBS + 1), "logprobs"),
    (completion(prompt_logprobs=validation.MAX_TOP_LOGPROBS + 1), "prompt_logprobs"),
    (chat(stop=["x"] * (validation.MAX_STOP_STRINGS + 1)), "stop"),
    (chat(stop="x" * (validation.MAX_STOP_CHARS + 1)), "stop"),
    (chat(stop_token_ids=[1] * (validation.MAX_STOP_TOKEN_IDS + 1)), "stop_token_ids"),
    (chat(logit_bias={str(each): 1.0 for each in range(validation.MAX_LOGIT_BIAS + 1)}), "logit_bias"),
    (chat(logit_bias={"1" * 5000: 1.0}), "logit_bias"),
    (chat(allowed_token_ids=[1, *range(validation.MAX_ALLOWED_TOKEN_IDS + 1)]), "allowed_token_ids"),
    (chat(max_tokens=10**6), "max_tokens"),
    (completion([1] * 257), "prompt"),
    (completion("word " * 1000), "prompt"),
    (ChatCompletionRequest(model="tiny", messages=[ChatMessage("user", "word " * 1000)]), "messages"),
    (with_schema({"description": "x" * json_schema.MAX_SCHEMA_BYTES}), SCHEMA),
    (with_schema({"enum": [0] * json_schema.MAX_SCHEMA_NODES}), SCHEMA),
    (with_schema(nested(json_schema.MAX_SCHEMA_DEPTH)), SCHEMA + ".properties.a" * 16),
    (with_schema({"pattern": "x" * (json_schema.MAX_PATTERN_CHARS + 1)}), f"{SCHEMA}.pattern"),
    (with_schema({"type": "array", "minItems": json_schema.MAX_COUNT + 1}), f"{SCHEMA}.minItems"),
    (with_schema({"items": {"maxItems": 1e9}}), f"{SCHEMA}.items.maxItems"),
    (with_schema({"type": "object", "minProperties": 2**62}), f"{SCHEMA}.minProperties"),
    (with_schema({"$ref": "http://x/y"}), f"{SCHEMA}.$ref"),
    (asked(regex="x" * (structured.MAX_REGEX_CHARS + 1)), "structured_outputs.regex"),
    (asked(grammar="x" * (structured.MAX_GRAMMAR_CHARS + 1)), "structured_outputs.grammar"),
    (asked(choice=["x"] * (structured.MAX_CHOICES + 1)), "structured_outputs.choice"),
    (asked(choice=["x" * (structured.MAX_CHOICE_CHARS + 1)]), "structured_outputs.choice[0]"),
    (asked(json="[" * 100_000), "structured_outputs.json"),
    (with_tools(*(FunctionDefinition(f"f{each}") for each in range(tools.MAX_TOOLS + 1))), "tools"),
    (with_tools(FunctionDefinition("f", "x" * (tools.MAX_TOOLS_BYTES + 1))), "tools"),
    (with_tools(FunctionDefinition("f" * 65)), "tools[0].function.name"),
]


@pytest.mark.parametrize(("request_", "param"), BEYOND, ids=[f"{at} {each[1][:40]}" for at, each in enumerate(BEYOND)])
def test_a_request_beyond_a_bound_is_refused_by_name(request_: Any, param: str) -> None:
    async def run() -> None:
        async with harness() as case:
            endpoint = "chat" if isinstance(request_, ChatCompletionRequest) else "completions"
            got = await case.open(endpoint, request_).done()
            assert got.error is not None
            assert (got.error.param, got.error.info.status) == (param, 400)
            assert len(got.error.message) < 1000, "what was too large is not sent back"
            assert not case.router.requests and not case.workers["w1"].calls

    asyncio.run(run())
