"""OpenAI's request fields about tools and the form of the answer, and calls as answers carry them.

Decoding checks types; `core.tools.request` and `core.structured` check the rest, because what they refuse depends on
more than one field.
"""

from typing import Any, Literal

import msgspec


class FunctionDefinition(msgspec.Struct, frozen=True, omit_defaults=True):
    """parameters: a JSON schema of the arguments' object; None: the function takes none."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    """function: absent for tools of other types, which are refused by name."""

    type: str
    function: FunctionDefinition | None = None


class FunctionName(msgspec.Struct, frozen=True):
    name: str


class NamedToolChoice(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    function: FunctionName


class AllowedTools(msgspec.Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[NamedToolChoice]


class AllowedToolChoice(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice


class JsonSchemaFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """vLLM's extension of that name: exactly one field is set."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """arguments: JSON text, as the model wrote it; of a call that broke off, its beginning."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of one call. id and name come with its first piece, arguments with any."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
