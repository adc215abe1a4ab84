"""Rendering a conversation with the model's own chat template.

The environment is the one Hugging Face renders these templates in, so that one template gives one prompt here and in
training: immutable sandbox, trimmed blocks, `break` and `continue`, `raise_exception`, `strftime_now` (local time),
`tojson` without HTML escapes, and the `generation` block, which only marks text for training and renders as its body.
Source: huggingface/transformers, utils/chat_template_utils.py.

The template is the model's, compiled once; a request cannot bring one. What it can take (content as a string or as a
list of parts, tool results, a developer role) is found out at load by rendering small conversations.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from stator.errors import ConfigError, ErrorCode, StatorError
from stator.messages.openai import ChatMessage, TextPart

_Message = dict[str, Any]

_NO_ARGUMENTS: Mapping[str, Any] = {}

PARTS_SEPARATOR = "\n"
"""Between text parts for a template that takes strings only, as vLLM joins them."""


class TemplateRefusal(jinja2.TemplateError):
    """The template called raise_exception: its message is written for the person who sent the messages."""


class _GenerationBlock(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore: storing one is a known step out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # the signature lets a template store a name called self
        attributes: dict[Any, Any] = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class _DictMaker:
    """`dict(...)` for templates, without handing them the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template must not store {name!r} in a namespace")


def _raise_exception(message: object) -> None:
    raise TemplateRefusal(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(now: Callable[[], datetime]) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json

    def strftime_now(format: str) -> str:
        return now().strftime(format)

    helpers: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": strftime_now,
        "namespace": _Namespace,
        "dict": _DictMaker(),
    }
    environment.globals.update(helpers)
    return environment


class ChatTemplate:
    """source: jinja2. origin: the file it is from, for errors. special_tokens: role to text ("bos_token": "<s>").

    Raises ConfigError if the source does not compile.
    """

    def __init__(
        self,
        source: str,
        *,
        origin: str,
        special_tokens: dict[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{origin}: the chat template does not compile: line {error.lineno}: {error}") from error
        # jinja2 keeps the environment's helpers and the template's own in a ChainMap, and copies it for each rendering.
        self._template.globals = dict(self._template.globals)
        self._special_tokens = special_tokens
        self._takes_parts = self._shows(_user(_PROBE_PARTS))
        self._takes_strings = self._shows(_user(_PROBE)) or not self._takes_parts
        self._takes_developer = self._shows({"role": "developer", "content": _PROBE}, _user("x"))
        self._takes_system = self._shows({"role": "system", "content": _PROBE}, _user("x"))
        self._mentions_tool_calls = "tool_calls" in source
        self._takes_tool = {role: self._shows(*_tool_probe(role)) for role in ("tool", "function")}

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[dict[str, Any]] = (),
        arguments: Mapping[str, Any] = _NO_ARGUMENTS,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt's text, special tokens included: encode it without adding any.

        tools: in OpenAI's shape. arguments: more of the template's own variables. add_generation_prompt: it ends with
        what begins an answer. continue_final_message: it ends with the last message's text, without what the template
        writes after it.

        Raises StatorError(INVALID_REQUEST), with the template's own message if it refuses the conversation, or
        UNSUPPORTED for a message that this template would drop in silence.
        """
        if not messages:
            raise StatorError(ErrorCode.INVALID_REQUEST, "messages must not be empty", param="messages")
        prepared = [self._prepare(message, f"messages[{index}]") for index, message in enumerate(messages)]
        if continue_final_message:
            _mark_end(prepared[-1], f"messages[{len(prepared) - 1}]")
        try:
            text = self._render(prepared, list(tools) or None, arguments, add_generation_prompt=add_generation_prompt)
        except TemplateRefusal as refusal:
            raise StatorError(ErrorCode.INVALID_REQUEST, str(refusal), param="messages") from refusal
        except Exception as error:  # a template is a program: anything may come out of it
            raise StatorError(
                ErrorCode.INVALID_REQUEST,
                "the model's chat template cannot render these messages; check their roles, order and content",
                param="messages",
            ) from error
        if not continue_final_message:
            return text
        before, mark, _ = text.rpartition(_END_MARK)
        if not mark:
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                "continue_final_message: this model's chat template does not show the last message's text as it is",
                param="continue_final_message",
            )
        return before

    def _render(
        self,
        messages: list[_Message],
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] = _NO_ARGUMENTS,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        return self._template.render(
            **self._special_tokens,
            **arguments,
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )

    def _shows(self, *messages: _Message) -> bool:
        """Whether these messages' probe text comes out as text: not refused, not dropped, not as a printed list."""
        try:
            text = self._render(list(messages))
        except Exception:
            return False
        return _PROBE in text and "'type': 'text'" not in text and '"type": "text"' not in text

    def _prepare(self, message: ChatMessage, where: str) -> _Message:
        self._check(message, where)
        role: str = message.role
        if role == "developer" and self._takes_system and not self._takes_developer:
            role = "system"
        prepared: _Message = {"role": role, "content": self._content(message.content)}
        if message.name is not None:
            prepared["name"] = message.name
        if message.tool_calls is not None:
            prepared["tool_calls"] = [_with_parsed_arguments(call) for call in message.tool_calls]
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            # Templates know either name.
            prepared |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if message.tool_call_id is not None:
            prepared["tool_call_id"] = message.tool_call_id
        return prepared

    def _check(self, message: ChatMessage, where: str) -> None:
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise StatorError(ErrorCode.INVALID_REQUEST, f"{where}.content is required", param=f"{where}.content")
        if not self._takes_tool.get(message.role, True):
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                f"{where}.role: this model's chat template does not take messages with the role {message.role!r}",
                param=f"{where}.role",
            )
        if message.tool_calls and not self._mentions_tool_calls:
            raise StatorError(
                ErrorCode.UNSUPPORTED,
                f"{where}.tool_calls: this model's chat template does not take tool calls",
                param=f"{where}.tool_calls",
            )

    def _content(self, content: str | list[TextPart] | None) -> str | list[dict[str, str]] | None:
        if content is None:
            return None
        if isinstance(content, str):
            return content if self._takes_strings else [{"type": "text", "text": content}]
        if self._takes_parts:
            return [{"type": "text", "text": part.text} for part in content]
        return PARTS_SEPARATOR.join(part.text for part in content)


_END_MARK = "xq7end-of-the-last-message"
"""Stands behind the text of a message that is to be continued, to find it in what the template made of it."""


def _mark_end(message: _Message, where: str) -> None:
    content: Any = message["content"]
    if isinstance(content, list) and content:
        message["content"] = [*content[:-1], {**content[-1], "text": content[-1]["text"] + _END_MARK}]
    elif isinstance(content, str):
        message["content"] = content + _END_MARK
    else:
        raise StatorError(
            ErrorCode.INVALID_REQUEST,
            f"continue_final_message: {where} has no text to go on with",
            param=f"{where}.content",
        )


_PROBE = "xq7probe"
_PROBE_PARTS = [{"type": "text", "text": _PROBE}]


def _user(content: Any) -> _Message:
    return {"role": "user", "content": content}


def _tool_probe(role: str) -> list[_Message]:
    call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {}}}
    return [
        _user("x"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": role, "content": _PROBE, "name": "f", "tool_call_id": "call12345"},
    ]


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; templates expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
