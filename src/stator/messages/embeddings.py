"""`/v1/embeddings`: its requests, and what travels to an engine and back for each of their inputs."""

from typing import Any, Literal

import msgspec

from stator.ids import RequestId
from stator.messages.openai import Int, TokenId
from stator.messages.openai_fields import Effect, Field, harmless_values
from stator.messages.tokens import TokenBuffer

MAX_INPUTS = 2048
MAX_TOTAL_TOKENS = 300_000
"""Of all inputs together; a single one may always be as long as the model's context."""


class EmbeddingsRequest(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """input: one text, a list of texts, the token ids of one text, or a list of such: never mixed, as a completion's
    prompt. truncate_prompt_tokens: longer inputs are cut to so many, with -1 to the model's context."""

    model: str
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Int | None = None
    user: str | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True
    priority: Int | None = None
    cache_salt: str | None = None
    messages: Any = None
    use_activation: bool | None = None
    padding: str | None = None
    embed_dtype: str | None = None
    endianness: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None


class EmbedRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One input for an engine. dimensions: how many the vector is to have; None: all of the model's."""

    request_id: RequestId
    prompt_ids: TokenBuffer
    dimensions: int | None = None
    priority: int = 0
    cache_salt: str | None = None


class Embedding(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """vector: float32, little-endian. num_tokens: of the input. index: which of the request's inputs it was, once the
    Processor has said so."""

    vector: bytes
    num_tokens: int
    index: int = 0


def _field(name: str, note: str = "", effect: Effect = Effect.WORKS, *harmless: Any, extension: bool = False) -> Field:
    return Field(name, effect, note, harmless, extension)


def _refused(name: str, *harmless: Any, note: str = "") -> Field:
    return Field(name, Effect.REFUSED, note, harmless, extension=True)


EMBEDDING_FIELDS: tuple[Field, ...] = (
    _field("model"),
    _field("input", f"a text, texts, token ids or lists of token ids; at most {MAX_INPUTS}"),
    _field("encoding_format", "`float` if absent; `base64` has float32, little-endian"),
    _field("dimensions", "with vLLM and a Matryoshka model; other engines and models refuse it"),
    _field("user", "nothing is kept of it", Effect.ACCEPTED),
    _field("truncate_prompt_tokens", "-1 is the model's context; longer inputs are refused if absent", extension=True),
    _field("truncation_side", "`right`, if absent, drops the end", extension=True),
    _field("add_special_tokens", "to texts; true if absent", extension=True),
    _field("priority", "of requests that wait, those with a smaller number are first", extension=True),
    _field("cache_salt", "requests with different salts share no cached prompt", extension=True),
    _refused("messages", note="use `input`"),
    _refused("use_activation", True, note="vectors have length 1"),
    _refused("padding", "do_not_pad"),
    _refused("embed_dtype", "float32"),
    _refused("endianness", "native", "little"),
    _refused("mm_processor_kwargs", {}),
)

UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = harmless_values(EMBEDDING_FIELDS)


def unsupported_field(request: EmbeddingsRequest) -> str | None:
    """The first field that asks for what is not supported; None if there is none."""
    for name, harmless in UNSUPPORTED_UNLESS.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            return name
    return None
