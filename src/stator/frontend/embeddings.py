"""`POST /v1/embeddings`: a Processor's vectors as OpenAI's body."""

import base64
from array import array
from dataclasses import dataclass
from typing import Literal

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.frontend.decode import decode_embeddings
from stator.frontend.http import HttpExchange, unless_gone
from stator.frontend.unary import Answered, Request, Unary
from stator.messages.embeddings import Embedding, EmbeddingsRequest
from stator.messages.openai import PromptTokensDetails, Usage
from stator.runtime.context import CallContext
from stator.transport.base import Target, TransportClient
from stator.transport.calls import stream

_encode = msgspec.json.Encoder().encode


class EmbeddingUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class EmbeddingObject(msgspec.Struct, frozen=True):
    """embedding: as the request's encoding_format says; base64 of float32, little-endian."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingList(msgspec.Struct, frozen=True):
    """data: in the order of the inputs."""

    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


@dataclass(frozen=True, slots=True)
class EmbeddingsEndpoint(Unary):
    """Vectors come one by one, and each is written as it comes: thousands of them in one go would hold up the loop."""

    async def answer(
        self, http: HttpExchange, client: TransportClient, target: Target, request: Request, context: CallContext
    ) -> Answered:
        assert isinstance(request, EmbeddingsRequest)
        return await unless_gone(http, self._collect(client, target, request, context))

    async def _collect(
        self, client: TransportClient, target: Target, request: EmbeddingsRequest, context: CallContext
    ) -> Answered:
        written: dict[int, bytes] = {}
        num_tokens = 0
        async for items in stream(client, target, request, context=context, item_type=Embedding):
            for item in items:
                written[item.index] = write(item, in_base64=request.encoding_format == "base64")
                num_tokens += item.num_tokens
        if not written or len(written) != max(written) + 1:
            raise StatorError(ErrorCode.PROTOCOL, "the Processor ended its answer without all of the embeddings")
        tail = EmbeddingList([], request.model, EmbeddingUsage(num_tokens, num_tokens))
        return Answered(_body(tail, written), Usage(num_tokens, 0, num_tokens, PromptTokensDetails()))


def write(item: Embedding, *, in_base64: bool) -> bytes:
    """An EmbeddingObject as JSON."""
    shown = _in_base64(item.vector) if in_base64 else _numbers(item.vector)
    return _encode(EmbeddingObject(item.index, shown))


def _in_base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")


def _numbers(vector: bytes) -> list[float]:
    numbers = array("f", vector)
    return numbers.tolist()


def _body(tail: EmbeddingList, written: dict[int, bytes]) -> bytes:
    """tail: the list without its data."""
    rest = _encode(tail)
    begin = b'{"data":['
    assert rest.startswith(begin)
    return begin + b",".join(written[index] for index in range(len(written))) + rest[len(begin) :]


EMBEDDINGS_ENDPOINT = EmbeddingsEndpoint("embeddings", decode_embeddings, Embedding, _encode)
