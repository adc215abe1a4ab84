"""gpt-oss's harmony format: messages with a header that says channel and recipient.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{…}<|call|>                       and at last <|start|>assistant<|channel|>final<|message|>…<|return|>

The prompt ends with `<|start|>assistant`, so the output begins inside a header. Channel `analysis` is reasoning,
`final` and a `commentary` to nobody are content, a message to `functions.NAME` is a call, one to another recipient (the
model's built-in tools, which nobody here runs) is reasoning. Text that is no message is content.

`<|call|>` and `<|return|>` are stop tokens, whose text the output usually lacks: its end ends the message as they do.
"""

import re

from stator.core.tools.base import MAX_NAME_CHARS, CallParser
from stator.core.tools.events import Reasoning
from stator.core.tools.json_text import copy_composite
from stator.core.tools.reader import Markers, NotACall, Steps

START = "<|start|>"
CHANNEL = "<|channel|>"
CONSTRAIN = "<|constrain|>"
MESSAGE = "<|message|>"
END = "<|end|>"
CALL = "<|call|>"
RETURN = "<|return|>"
MAX_HEADER_CHARS = 512 + MAX_NAME_CHARS
_HEADER_ENDS = Markers(MESSAGE, END, CALL, RETURN)
_BODY_ENDS = Markers(END, CALL, RETURN)
_RESUMPTIONS = Markers(START, CHANNEL, END, CALL, RETURN)
_OPENINGS = (START, CHANNEL, "assistant", "to=")
"""What a header begins with, the first of an output in the middle."""
_CHANNEL = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


class HarmonyParser(CallParser):
    _is_message = False

    def _parse(self) -> Steps[None]:
        opening = ""
        while opening or (yield from self._reader.peek()):
            self._is_message = False
            yield from self._attempt(self._message(opening), opening)
            opening = ""
            if not self._is_message:
                marker = yield from self._reader.until(_RESUMPTIONS, self._content)
                opening = marker if marker in (START, CHANNEL) else ""

    def _message(self, opening: str) -> Steps[None]:
        """A header up to `<|message|>` and the body behind it. opening: the header's part that is consumed."""
        reader = self._reader
        yield from reader.space()
        opening = opening or (yield from reader.expect(*_OPENINGS))
        header, marker = yield from reader.text_until(_HEADER_ENDS, MAX_HEADER_CHARS)
        header = opening + header
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if marker != MESSAGE or (channel is None and recipient is None):
            raise NotACall
        if recipient is not None and recipient[1].startswith(_FUNCTIONS) and len(recipient[1]) > len(_FUNCTIONS):
            yield from self._call(recipient[1].removeprefix(_FUNCTIONS))
        else:
            reader.recorded()
            hidden = recipient is not None or (channel is not None and channel[1] == "analysis")
            yield from reader.until(_BODY_ENDS, self._reasoning if hidden else self._content)
        self._is_message = True

    def _reasoning(self, text: str) -> None:
        self._events.append(Reasoning(text))

    def _call(self, name: str) -> Steps[None]:
        reader = self._reader
        yield from reader.space()
        self._start(name)
        char = yield from reader.peek()
        if char == "{":
            yield from copy_composite(reader, self._arguments)
        elif char == "<":
            self._arguments("{}")
        else:
            # Not JSON, as the model was told: what it wrote all the same, marked as broken.
            yield from reader.until(_BODY_ENDS, self._arguments)
            raise NotACall
        self._end()
        yield from self._attempt(self._body_end())

    def _body_end(self) -> Steps[None]:
        yield from self._reader.space()
        if (yield from self._reader.peek()):
            yield from self._reader.expect(*_BODY_ENDS.texts)
