"""Endpoints of a Processor that answer with one item: how their requests are read, and how the answer is written."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.frontend.decode import decode_detokenize, decode_tokenize, undeclared_fields
from stator.frontend.http import OPENAI_ERRORS, ErrorForm, HttpExchange
from stator.messages.embeddings import EmbeddingsRequest
from stator.messages.openai import ModelCard, Usage
from stator.messages.tokenize import Detokenized, DetokenizeRequest, TokenizeAnswer, Tokenized, TokenizeRequest
from stator.messages.tokens import num_tokens, unpack
from stator.runtime.context import CallContext
from stator.transport.base import Target, TransportClient
from stator.transport.calls import call

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode

Request = TokenizeRequest | DetokenizeRequest | EmbeddingsRequest


@dataclass(frozen=True, slots=True)
class Answered:
    """usage: where there is something to count."""

    body: bytes
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Unary:
    """label: the endpoint's name, at the Processor too. decode: of a body; raises StatorError. item_type: of the
    Processor's item. encode: that item as a body. errors, generates: as of a Dialect."""

    label: str
    decode: Callable[[bytes], Request]
    item_type: type[Any]
    encode: Callable[[Any], bytes]
    errors: ErrorForm = OPENAI_ERRORS
    generates: bool = False

    async def answer(
        self, http: HttpExchange, client: TransportClient, target: Target, request: Request, context: CallContext
    ) -> Answered:
        """Raises StatorError, or ClientGone."""
        item = await call(client, target, request, context=context, item_type=self.item_type)
        return Answered(self.encode(item))

    def request(self, body: bytes, models: Callable[[], Sequence[ModelCard]], call_id: str) -> Request:
        """Raises StatorError(INVALID_REQUEST), also for a request without a model where there are several."""
        request = self.decode(body)
        if logger.isEnabledFor(logging.DEBUG) and (ignored := undeclared_fields(request, body)):
            logger.debug("request %s: fields that are not known are ignored: %r", call_id, ignored)
        if request.model is None and len(served := models()) > 1:
            names = ", ".join(card.id for card in served)
            raise StatorError(
                ErrorCode.INVALID_REQUEST, f"Missing required field: 'model'; served models: {names}.", param="model"
            )
        return request


def not_served(path: str) -> StatorError:
    """Of a deployment whose Processor is somebody's own, and does less."""
    return StatorError(ErrorCode.NOT_FOUND, f"The Processor of this deployment does not serve {path}.")


def _encode_tokenized(item: Tokenized) -> bytes:
    return _encode(
        TokenizeAnswer(num_tokens(item.tokens), item.max_model_len, unpack(item.tokens), token_strs=item.strings)
    )


TOKENIZE = Unary("tokenize", decode_tokenize, Tokenized, _encode_tokenized)
DETOKENIZE = Unary("detokenize", decode_detokenize, Detokenized, _encode)
