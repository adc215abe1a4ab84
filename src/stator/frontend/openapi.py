"""`GET /openapi.json`: what this server serves, as an OpenAPI 3.1 document. Pure.

Made from what serves it: request fields from the structs that bodies are decoded to, the tables of what becomes of each
(`messages.openai_fields`) and of their ranges (`messages.openai_limits`); statuses from the table of errors. Tests hold
the paths against the routes and the answers against their schemas.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import msgspec

import stator
from stator.errors import ERRORS, ErrorCode
from stator.frontend import anthropic as anthropic_api
from stator.frontend import openapi_answers as answers
from stator.frontend import openapi_anthropic
from stator.frontend.embeddings import EmbeddingList
from stator.messages import anthropic, embeddings, openai, openai_limits, responses, tokenize
from stator.messages.anthropic_fields import COUNT_FIELDS, MESSAGES_FIELDS
from stator.messages.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, Effect, Field
from stator.messages.openai_limits import RANGES
from stator.messages.responses_fields import RESPONSES_FIELDS
from stator.observability.metrics import CONTENT_TYPE

Json = dict[str, Any]

_REF = "#/components/schemas/{name}"
_HEAD_TOO_LARGE = 431

_OF_ANY = (ErrorCode.INVALID_REQUEST, ErrorCode.REQUEST_TIMEOUT, ErrorCode.INTERNAL)
"""Bytes that are no HTTP, a head that does not come to an end, and what nobody thought of."""

_NEVER_ANSWERED = {
    ErrorCode.UNAUTHORIZED,
    ErrorCode.NOT_FOUND,
    ErrorCode.METHOD_NOT_ALLOWED,
    ErrorCode.CANCELLED,
    ErrorCode.SLOW_READER,
}
"""By a path that generates: of other paths, or told to nobody."""

_OF_GENERATION = tuple(code for code in ERRORS if code not in _NEVER_ANSWERED)
_OF_AN_ENGINE = {
    ErrorCode.ENGINE_DEAD,
    ErrorCode.ENGINE_CRASHED,
    ErrorCode.POISON_REQUEST,
    ErrorCode.NOT_RESUMABLE,
    ErrorCode.TRANSFER_FAILED,
}
_OF_TOKENIZATION = (*(code for code in _OF_GENERATION if code not in _OF_AN_ENGINE), ErrorCode.NOT_FOUND)
_OF_DECISIONS = (
    *_OF_ANY,
    ErrorCode.NOT_FOUND,
    ErrorCode.INSTANCE_LOST,
    ErrorCode.STALE_INSTANCE,
    ErrorCode.PROTOCOL,
    ErrorCode.OVERLOADED,
    ErrorCode.NO_INSTANCE,
    ErrorCode.DRAINING,
    ErrorCode.DEADLINE,
)


@dataclass(frozen=True, slots=True)
class _Operation:
    """answer: a struct for JSON, or a media type. request: of a POST, with its table of fields. chunk: of a stream.

    parameter: the last part of the path. answered: statuses with the answer's schema. events: of a stream of
    named ones. anthropic: errors are in that form. deleted: the answer of a DELETE. query: parameters of a GET.
    """

    path: str
    name: str
    summary: str
    answer: type[msgspec.Struct] | str
    errors: Sequence[ErrorCode] = _OF_ANY
    request: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None
    parameter: str | None = None
    answered: tuple[int, ...] = (200,)
    deleted: type[msgspec.Struct] | None = None
    query: tuple[tuple[str, str, Json], ...] = ()
    events: tuple[type[msgspec.Struct], ...] = ()
    anthropic: bool = False

    @property
    def error(self) -> type[msgspec.Struct]:
        return openapi_anthropic.AnthropicError if self.anthropic else openai.ErrorResponse

    def status(self, code: ErrorCode) -> int:
        return anthropic_api.type_and_status(code)[1] if self.anthropic else ERRORS[code].status


_OPERATIONS = (
    _Operation(
        "/v1/chat/completions",
        "createChatCompletion",
        "Answer a conversation",
        answers.ChatCompletion,
        _OF_GENERATION,
        openai.ChatCompletionRequest,
        answers.ChatCompletionChunk,
    ),
    _Operation(
        "/v1/completions",
        "createCompletion",
        "Continue one or more prompts",
        answers.TextCompletion,
        _OF_GENERATION,
        openai.CompletionRequest,
        answers.TextCompletionChunk,
    ),
    _Operation(
        "/v1/embeddings",
        "createEmbedding",
        "A vector for each of one or more texts",
        EmbeddingList,
        (*_OF_GENERATION, ErrorCode.NOT_FOUND),
        embeddings.EmbeddingsRequest,
    ),
    _Operation(
        anthropic_api.MESSAGES_PATH,
        "createMessage",
        "Answer a conversation, in Anthropic's shape",
        openapi_anthropic.AnthropicMessage,
        _OF_GENERATION,
        anthropic.MessagesRequest,
        events=openapi_anthropic.EVENTS,
        anthropic=True,
    ),
    _Operation(
        anthropic_api.COUNT_TOKENS_PATH,
        "countTokens",
        "The length of a conversation's prompt",
        openapi_anthropic.TokensCounted,
        _OF_TOKENIZATION,
        anthropic.CountTokensRequest,
        anthropic=True,
    ),
    _Operation(
        "/v1/responses",
        "createResponse",
        "Answer a conversation that may be kept",
        answers.ResponseObject,
        (*_OF_GENERATION, ErrorCode.NOT_FOUND),
        responses.ResponsesRequest,
        answers.ResponseEvent,
    ),
    _Operation(
        "/v1/responses/{id}",
        "showResponse",
        "A response that is kept",
        answers.ResponseObject,
        (*_OF_ANY, ErrorCode.NOT_FOUND),
        parameter="id",
        deleted=answers.DeletedResponse,
    ),
    _Operation(
        "/v1/responses/{id}/input_items",
        "listInputItems",
        "What went into a response that is kept",
        answers.InputItems,
        (*_OF_ANY, ErrorCode.NOT_FOUND),
        parameter="id",
        query=(
            ("limit", "Items of a page.", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
            ("order", "The newest first, or the oldest.", {"enum": ["desc", "asc"], "default": "desc"}),
            ("after", "The id of the last item of the page before.", {"type": "string"}),
        ),
    ),
    _Operation(
        "/tokenize",
        "tokenize",
        "The tokens of a prompt or a conversation",
        tokenize.TokenizeAnswer,
        _OF_TOKENIZATION,
        tokenize.TokenizeRequest,
    ),
    _Operation(
        "/detokenize",
        "detokenize",
        "The text of tokens",
        tokenize.Detokenized,
        _OF_TOKENIZATION,
        tokenize.DetokenizeRequest,
    ),
    _Operation("/v1/models", "listModels", "The models that are served", openai.ModelList),
    _Operation(
        "/v1/models/{model}",
        "showModel",
        "One of them",
        openai.ModelCard,
        (*_OF_ANY, ErrorCode.MODEL_NOT_FOUND, ErrorCode.NOT_FOUND),
        parameter="model",
    ),
    _Operation(
        "/v1/stator/decisions/{id}",
        "showDecisions",
        "Where a request was sent and why; its id is that of the answer's body",
        answers.Decisions,
        _OF_DECISIONS,
        parameter="id",
    ),
    _Operation("/health", "health", "Whether a request can be finished", answers.Health, answered=(200, 503)),
    _Operation("/live", "live", "Whether this process answers", answers.Liveness),
    _Operation("/metrics", "metrics", "Figures in Prometheus' text format", CONTENT_TYPE.split(";")[0]),
    _Operation("/version", "version", "Stator's version", answers.Version),
    _Operation("/openapi.json", "describe", "This document", "application/json"),
)

_FIELDS: dict[type[msgspec.Struct], Sequence[Field]] = {
    openai.ChatCompletionRequest: CHAT_FIELDS,
    openai.CompletionRequest: COMPLETION_FIELDS,
    embeddings.EmbeddingsRequest: embeddings.EMBEDDING_FIELDS,
    anthropic.MessagesRequest: MESSAGES_FIELDS,
    anthropic.CountTokensRequest: COUNT_FIELDS,
    responses.ResponsesRequest: RESPONSES_FIELDS,
    tokenize.TokenizeRequest: tokenize.TOKENIZE_FIELDS,
    tokenize.DetokenizeRequest: tokenize.DETOKENIZE_FIELDS,
}

_HEADERS: tuple[tuple[str, str, Json], ...] = (
    ("x-request-timeout-s", "Seconds until the request is given up.", {"type": "number", "exclusiveMinimum": 0}),
    ("x-session-id", "Requests with one value prefer the same worker.", {"type": "string"}),
    ("x-stator-explain", "1: headers of the answer say where it was made and why.", {"type": "string"}),
    ("traceparent", "W3C trace context, carried on.", {"type": "string"}),
    ("tracestate", "W3C trace context, carried on.", {"type": "string"}),
)


@cache
def document_json() -> bytes:
    return msgspec.json.encode(document())


def document() -> Json:
    schemas = _schemas()
    paths: Json = {}
    for operation in _OPERATIONS:
        if operation.request is not None:
            paths[operation.path] = {"post": _operation(operation)}
        else:
            paths[operation.path] = {"get": _operation(operation), "head": _operation(operation, head=True)}
        if operation.deleted is not None:
            name, summary = operation.name.replace("show", "delete"), operation.summary + ", forgotten"
            deletion = replace(operation, name=name, summary=summary, answer=operation.deleted)
            paths[operation.path]["delete"] = _operation(deletion)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stator",
            "version": stator.__version__,
            "description": "OpenAI's API for models served over several machines.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(operation: _Operation, *, head: bool = False) -> Json:
    made: Json = {
        "operationId": operation.name + ("Head" if head else ""),
        "summary": operation.summary + (", without a body" if head else ""),
        "parameters": [_header("x-request-id", "Is in the answer's head and in the log; made up if absent.")],
        "responses": _responses(operation, head=head),
    }
    if operation.parameter is not None:
        made["parameters"].append(
            {"name": operation.parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        )
    made["parameters"] += [
        {"name": name, "in": "query", "description": text, "schema": schema} for name, text, schema in operation.query
    ]
    if operation.request is not None:
        made["parameters"] += [_header(name, text, schema) for name, text, schema in _HEADERS]
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(operation.request)}}}
    return made


def _header(name: str, text: str, schema: Json | None = None) -> Json:
    return {"name": name, "in": "header", "description": text, "schema": schema or {"type": "string"}}


def _responses(operation: _Operation, *, head: bool) -> Json:
    responses: Json = {}
    by_status: dict[int, list[ErrorCode]] = {}
    for code in operation.errors:
        by_status.setdefault(operation.status(code), []).append(code)
    by_status[_HEAD_TOO_LARGE] = [ErrorCode.INVALID_REQUEST]
    for status in operation.answered:
        responses[str(status)] = {"description": "The answer.", "headers": _answer_headers(status)}
        if not head:
            responses[str(status)]["content"] = _content(operation)
    for status, codes in sorted(by_status.items()):
        text = "An error; `code` is " + " or ".join(code.value for code in codes) + "."
        if operation.anthropic:
            text = "An error; `type` is " + " or ".join(dict.fromkeys(map(_anthropic_type, codes))) + "."
        described: Json = {"description": text, "headers": _answer_headers(status)}
        if not head:
            described["content"] = {"application/json": {"schema": _ref(_error_of(operation, status))}}
        responses.setdefault(str(status), described)
    return responses


def _answer_headers(status: int) -> Json:
    headers: Json = {} if status == _HEAD_TOO_LARGE else {"x-request-id": {"schema": {"type": "string"}}}
    if status in (429, 503, 529):
        headers["retry-after"] = {
            "description": "Seconds; where a retry is known to help.",
            "schema": {"type": "integer", "minimum": 1},
        }
    return headers


def _content(operation: _Operation) -> Json:
    if isinstance(operation.answer, str):
        schema: Json = {"type": "object"} if operation.answer == "application/json" else {"type": "string"}
        return {operation.answer: {"schema": schema}}
    content: Json = {"application/json": {"schema": _ref(operation.answer)}}
    if operation.chunk is not None:
        is_typed = operation.chunk is answers.ResponseEvent
        content["text/event-stream"] = {"schema": _typed_event() if is_typed else _event(operation.chunk)}
    if operation.events:
        content["text/event-stream"] = {"schema": _named_event((*operation.events, operation.error))}
    return content


def _anthropic_type(code: ErrorCode) -> str:
    return anthropic_api.type_and_status(code)[0]


def _error_of(operation: _Operation, status: int) -> type[msgspec.Struct]:
    """Bytes that are no HTTP have no path."""
    return openai.ErrorResponse if status == _HEAD_TOO_LARGE else operation.error


def _named_event(structs: Iterable[type[msgspec.Struct]]) -> Json:
    return {
        "type": "object",
        "description": "With `stream`: each event, whose name is the `type` of its data. The last is message_stop, or "
        "error where the answer broke off.",
        "required": ["event", "data"],
        "properties": {
            "event": {"type": "string"},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"anyOf": [_ref(each) for each in structs]},
            },
        },
    }


def _event(chunk: type[msgspec.Struct]) -> Json:
    """One of a stream. Before OpenAPI 3.2 nothing says more of a stream than its events' schema."""
    data: Json = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(chunk), _ref(openai.ErrorResponse)]},
    }
    return {
        "type": "object",
        "description": "With `stream`: each event. The last is [DONE], or an error where the answer broke off.",
        "required": ["data"],
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
    }


def _typed_event() -> Json:
    data: Json = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": _ref(answers.ResponseEvent),
    }
    return {
        "type": "object",
        "description": "With `stream`: each event. The last is response.completed, response.incomplete or "
        "response.failed.",
        "required": ["event", "data"],
        "properties": {"event": {"type": "string"}, "data": data},
    }


def _ref(struct: type[msgspec.Struct]) -> Json:
    return {"$ref": _REF.format(name=struct.__name__)}


def _schemas() -> Json:
    structs: list[Any] = [openai.ErrorResponse]
    for operation in _OPERATIONS:
        told = (
            operation.answer,
            operation.request,
            operation.chunk,
            operation.error,
            operation.deleted,
            *operation.events,
        )
        structs += [each for each in told if _is_struct(each)]
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REF)
    for schema in schemas.values():
        # Written for those who read the code.
        schema.pop("description", None)
    for struct, fields in _FIELDS.items():
        _describe_fields(schemas[struct.__name__]["properties"], fields)
    _refuse(schemas["ChatMessage"]["properties"], CHAT_FIELDS, "messages.")
    _refuse(schemas["StreamOptions"]["properties"], CHAT_FIELDS, "stream_options.")
    _refuse(schemas["ToolDefinition"]["properties"], MESSAGES_FIELDS, "tools.")
    _refuse(schemas["TextConfig"]["properties"], RESPONSES_FIELDS, "text.")
    _refuse(schemas["ReasoningConfig"]["properties"], RESPONSES_FIELDS, "reasoning.")
    for schema, patch in _PATCHES:
        _patch(schemas[schema]["properties"], patch)
    schemas["ChatMessage"]["anyOf"] = _SAYS_SOMETHING
    schemas["TokenizeRequest"]["oneOf"] = _ONE_TEXT
    schemas["ErrorBody"]["properties"]["code"] = {"enum": sorted(code.value for code in ErrorCode)}
    return schemas


def _is_struct(each: object) -> bool:
    return isinstance(each, type) and issubclass(each, msgspec.Struct)


def _describe_fields(properties: Json, fields: Iterable[Field]) -> None:
    for name, limits in RANGES.items():
        if name in properties:
            _patch(properties, {name: {"number": _bounds(limits), "integer": _bounds(limits)}})
    for each in fields:
        if "." in each.name:
            continue
        if each.effect is not Effect.WORKS:
            text = "; ".join(part for part in (f"{each.effect.value}", each.note) if part)
        else:
            text = each.note
        if text:
            properties[each.name]["description"] = text[:1].upper() + text[1:] + "."
    _refuse(properties, fields, "")


def _refuse(properties: Json, fields: Iterable[Field], prefix: str) -> None:
    """A field that is refused has the values with which it asks for nothing."""
    for each in fields:
        name = each.name.removeprefix(prefix)
        if each.effect is not Effect.REFUSED or not each.name.startswith(prefix) or "." in name:
            continue
        known = properties[name]
        if known.get("type") == "boolean":
            known["enum"] = list(each.harmless)
            continue
        if name not in _REFUSED_IN_PART:
            properties[name] = {
                **{key: known[key] for key in ("description", "default") if key in known},
                "enum": [None, *each.harmless],
            }


_REFUSED_IN_PART = frozenset({"best_of"})
"""Passes as what another field says."""


def _bounds(limits: openai_limits.Range) -> Json:
    bounds: Json = {"exclusiveMinimum" if limits.low_excluded else "minimum": limits.low}
    if limits.high != openai_limits.INFINITY:
        bounds["maximum"] = limits.high
    return bounds


def _patch(properties: Json, patch: dict[str, dict[str, Json]]) -> None:
    """patch: field to type to what is added to the schema of that type, be it one of several."""
    for name, by_type in patch.items():
        for branch in properties[name].get("anyOf", [properties[name]]):
            branch.update(by_type.get(branch.get("type"), {}))


_SAYS_SOMETHING: list[Json] = [
    {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
    {
        "required": ["tool_calls"],
        "properties": {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}},
    },
]
_ONE_TEXT: list[Json] = [
    {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
    {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
]
_TEXTS: Json = {"type": "string", "minLength": 1}
_TOKEN_IDS: Json = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
_MANY = {"minItems": 1, "maxItems": openai_limits.MAX_CHOICES}
_MANY_INPUTS = {"minItems": 1, "maxItems": embeddings.MAX_INPUTS}
_OF_BOTH: dict[str, dict[str, Json]] = {
    "stop": {
        "string": {"minLength": 1, "maxLength": openai_limits.MAX_STOP_CHARS},
        "array": {
            "maxItems": openai_limits.MAX_STOP_STRINGS,
            "items": {"type": "string", "minLength": 1, "maxLength": openai_limits.MAX_STOP_CHARS},
        },
    },
    "stop_token_ids": {"array": {"maxItems": openai_limits.MAX_STOP_TOKEN_IDS}},
    "allowed_token_ids": {"array": {"minItems": 1, "maxItems": openai_limits.MAX_ALLOWED_TOKEN_IDS}},
    "logit_bias": {
        "object": {
            "maxProperties": openai_limits.MAX_LOGIT_BIAS,
            "propertyNames": {"pattern": f"^[0-9]{{1,{openai_limits.MAX_ID_DIGITS}}}$"},
            "additionalProperties": {
                "type": "number",
                "minimum": -openai_limits.MAX_BIAS,
                "maximum": openai_limits.MAX_BIAS,
            },
        }
    },
    "cache_salt": {"string": {"minLength": 1}},
}
_STOP_SEQUENCES: dict[str, Json] = {"array": _OF_BOTH["stop"]["array"]}
_PATCHES: tuple[tuple[str, dict[str, dict[str, Json]]], ...] = (
    ("ResponsesRequest", _OF_BOTH),
    ("ChatCompletionRequest", {**_OF_BOTH, "messages": {"array": {"minItems": 1}}}),
    (
        "CompletionRequest",
        {
            **_OF_BOTH,
            "prompt": {
                "string": {"minLength": 1},
                "array": {
                    "items": {},
                    "anyOf": [
                        {"items": _TEXTS, **_MANY},
                        {"items": {"type": "array", **_TOKEN_IDS}, **_MANY},
                        {key: _TOKEN_IDS[key] for key in ("items", "minItems")},
                    ],
                },
            },
            "max_tokens": {"integer": {"minimum": 0}},
            "logprobs": {"integer": {"minimum": 0, "maximum": openai_limits.MAX_TOP_LOGPROBS}},
        },
    ),
    (
        "EmbeddingsRequest",
        {
            "input": {
                "string": {"minLength": 1},
                "array": {
                    "items": {},
                    "anyOf": [
                        {"items": _TEXTS, **_MANY_INPUTS},
                        {"items": {"type": "array", **_TOKEN_IDS}, **_MANY_INPUTS},
                        {key: _TOKEN_IDS[key] for key in ("items", "minItems")},
                    ],
                },
            },
            "dimensions": {"integer": {"minimum": 1}},
            "truncate_prompt_tokens": {"integer": {"minimum": -1}},
            "cache_salt": {"string": {"minLength": 1}},
        },
    ),
    ("MessagesRequest", {"messages": {"array": {"minItems": 1}}, "stop_sequences": _STOP_SEQUENCES}),
    ("CountTokensRequest", {"messages": {"array": {"minItems": 1}}}),
    ("Message", {"content": {"array": {"minItems": 1}}}),
    ("TokenizeRequest", {"messages": {"array": {"minItems": 1}}}),
    ("DetokenizeRequest", {"tokens": {"array": {"maxItems": tokenize.MAX_TOKENS}}}),
)
