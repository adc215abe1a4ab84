"""`/tokenize` and `/detokenize`: their requests, under the names of vLLM's server, and what the Processor answers.

The tokens of an answer travel as one buffer; the Frontend writes them out as the list that HTTP shows.
"""

from typing import Any

import msgspec

from stator.messages.openai import ChatMessage, TokenId
from stator.messages.openai_fields import Effect, Field, harmless_values
from stator.messages.tokens import TokenBuffer
from stator.messages.tools import Tool

MAX_TOKENS = 2**20
"""Of one request to either; what is longer than that is longer than any model's context."""


class TokenizeRequest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A prompt, or messages: exactly one of them. model: may be left out where one model is served.

    add_special_tokens: None means true for a prompt, and false for messages, whose template writes them.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[Tool] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


class Tokenized(msgspec.Struct, frozen=True, omit_defaults=True):
    """The Processor's one item. strings: of each token as the vocabulary spells it, if asked for."""

    tokens: TokenBuffer
    max_model_len: int
    strings: list[str] | None = None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """max_model_len: tokens. token_strs: null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


def _field(name: str, note: str = "", *harmless: Any, effect: Effect = Effect.WORKS) -> Field:
    return Field(name, effect, note, harmless, extension=True)


_MODEL = _field("model", "may be left out where one model is served")

TOKENIZE_FIELDS: tuple[Field, ...] = (
    _MODEL,
    _field("prompt", "a text; this or `messages`"),
    _field("messages", "as in chat completions"),
    _field("add_special_tokens", "true if absent, but false with `messages`: the template writes them"),
    _field("return_token_strs", "the tokens also as the vocabulary spells them"),
    _field("add_generation_prompt", "with `messages`; true if absent"),
    _field("continue_final_message", "with `messages`, and without `add_generation_prompt`"),
    _field("tools", "with `messages`, as in chat completions"),
    _field("chat_template", "the model's own is used", effect=Effect.REFUSED),
    _field("chat_template_kwargs", "with `messages`, as in chat completions"),
    _field("mm_processor_kwargs", "", {}, effect=Effect.REFUSED),
)

DETOKENIZE_FIELDS: tuple[Field, ...] = (
    _MODEL,
    _field("tokens", f"at most {MAX_TOKENS}; special tokens are shown"),
)

UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = harmless_values(TOKENIZE_FIELDS)
"""As `openai_fields.UNSUPPORTED_UNLESS`, of TokenizeRequest."""


def unsupported_field(request: TokenizeRequest) -> str | None:
    """The first field that asks for what is not supported; None if there is none."""
    for name, harmless in UNSUPPORTED_UNLESS.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            return name
    return None
