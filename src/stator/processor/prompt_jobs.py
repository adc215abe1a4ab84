"""What a request's prompt is made of, and making it: the conversation's text by the model's template, and its tokens.

Done in the Processor itself, or in a process of its own that can be killed (`prompt_child`), to which these go as
msgpack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from stator.errors import StatorError
from stator.messages.control import ErrorMessage
from stator.messages.openai import ChatMessage
from stator.messages.tokens import TokenBuffer
from stator.processor.chat_template import ChatTemplate
from stator.processor.tokenizer import ModelTokenizer


class ChatPrompt(msgspec.Struct, frozen=True):
    """As `ChatTemplate.render` takes it."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] = []
    arguments: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def num_chars(self) -> int:
        """Of the texts of its messages, which are nearly all of it."""
        num_chars = 0
        for message in self.messages:
            content = message.content
            if isinstance(content, str):
                num_chars += len(content)
            elif content is not None:
                num_chars += sum(len(part.text) for part in content)
        return num_chars


class TextPrompt(msgspec.Struct, frozen=True):
    text: str
    add_special_tokens: bool


class PromptJob(msgspec.Struct, frozen=True):
    """chat: to be rendered to one text; None: texts are given. add_special_tokens: to the rendered text."""

    chat: ChatPrompt | None = None
    texts: list[TextPrompt] = []
    add_special_tokens: bool = False


class Prepared(msgspec.Struct, frozen=True):
    """text: what was rendered, empty for texts that were given. ids: of each text. error: instead of both."""

    text: str = ""
    ids: list[bytes] = []
    error: ErrorMessage | None = None


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """chat_template: None for a model without one; nobody asks it to render then."""

    tokenizer: ModelTokenizer
    chat_template: ChatTemplate | None

    def render(self, chat: ChatPrompt) -> str:
        """Raises StatorError, as `ChatTemplate.render`."""
        assert self.chat_template is not None
        return self.chat_template.render(
            chat.messages,
            tools=chat.tools,
            arguments=chat.arguments,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
        )

    def encode(self, texts: Sequence[TextPrompt]) -> list[TokenBuffer]:
        """Raises StatorError, as `ModelTokenizer.encode`."""
        return [self.tokenizer.encode(each.text, add_special_tokens=each.add_special_tokens) for each in texts]

    def make(self, job: PromptJob) -> Prepared:
        try:
            if job.chat is None:
                return Prepared(ids=list(self.encode(job.texts)))
            text = self.render(job.chat)
            return Prepared(text, list(self.encode([TextPrompt(text, job.add_special_tokens)])))
        except StatorError as error:
            return Prepared(error=ErrorMessage.of(error))
