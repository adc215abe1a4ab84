"""An engine's last words to a sink; what a sink raises is logged, since no request may take its engine along."""

import logging

from stator.errors import StatorError
from stator.messages.embeddings import Embedding
from stator.messages.engine import PrefillResult, TokenDelta
from stator.transport.base import Sink

logger = logging.getLogger(__name__)


def end_sink(sink: Sink, error: StatorError | None) -> None:
    try:
        sink.end(error)
    except Exception:
        logger.exception("a sink failed at its end")


def push_last(sink: Sink, item: TokenDelta | PrefillResult | Embedding) -> None:
    try:
        sink.items([item])
    except Exception:
        logger.exception("a sink failed at its last item")
    end_sink(sink, None)
