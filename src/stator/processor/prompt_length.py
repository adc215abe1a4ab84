"""Telling how long a prompt is, in the place of answering it."""

from collections.abc import Sequence

from stator.errors import Ending
from stator.messages.openai import PromptTokensDetails, Usage
from stator.messages.processor import CompletionDelta
from stator.messages.tokens import TokenBuffer, num_tokens
from stator.transport.base import Call


def tell_length(call: Call, prompts: Sequence[TokenBuffer]) -> None:
    """Ends the call, with one delta that has no text. A prompt longer than the model's context has a length as well."""
    length = sum(map(num_tokens, prompts))
    usage = Usage(length, 0, length, PromptTokensDetails(0))
    call.items([CompletionDelta(ending=Ending.STOP, usage=usage)])
    call.end()
