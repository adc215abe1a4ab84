"""The parser of one whole output: reasoning first, calls in what follows it.

White space between text and a call is markup: models put line breaks there, and an answer of calls alone has no text.
So content's white space before a call is dropped, and that behind the last call, and so is all of it where an output
with calls has nothing else.
"""

from stator.core.tools.events import CallStarted, Content, Event, Reasoning, joined
from stator.core.tools.parser import OutputParser
from stator.core.tools.trailing_space import TrailingSpace


class ComposedParser:
    """reasoning, tools: one or both. parallel: otherwise calls behind the first are left out."""

    def __init__(self, reasoning: OutputParser | None, tools: OutputParser | None, *, parallel: bool = True) -> None:
        self._parallel = parallel
        self._reasoning = reasoning
        self._tools = tools
        self._has_text = False
        self._has_calls = False
        self._space = TrailingSpace()

    def feed(self, text: str) -> list[Event]:
        if self._reasoning is None:
            events = self._called(text)
        else:
            events = self._content_called(self._reasoning.feed(text))
        return events if self._tools is None else self._trimmed(events)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._reasoning is not None:
            events = self._content_called(self._reasoning.finish())
        if self._tools is None:
            return events
        events = self._trimmed([*events, *self._tools.finish()])
        space = self._space.take()
        if space and not self._has_calls:
            events.append(Content(space))
        return joined(events)

    def _called(self, text: str) -> list[Event]:
        return [Content(text)] if self._tools is None else self._tools.feed(text)

    def _content_called(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        out: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                out += self._tools.feed(event.text)
            else:
                out.append(event)
        return out

    def _trimmed(self, events: list[Event]) -> list[Event]:
        out: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                self._trim(event.text, out)
                continue
            if isinstance(event, CallStarted):
                self._space.take()
                self._has_calls = True
            if self._parallel or isinstance(event, Reasoning) or event.index == 0:
                out.append(event)
        return joined(out) if len(out) > 1 else out

    def _trim(self, text: str, out: list[Event]) -> None:
        shown = self._space.add(text)
        if self._has_calls and not self._has_text:
            shown = shown.lstrip()
        if shown:
            out.append(Content(shown))
            self._has_text = True
