"""A parser of one model output."""

from typing import Protocol

from stator.core.tools.events import Content, Event, joined
from stator.core.tools.reader import Steps, TextReader


class OutputParser(Protocol):
    def feed(self, text: str) -> list[Event]:
        """The events that this text brings, neighbouring texts joined."""
        ...

    def finish(self) -> list[Event]:
        """The output is over: what was held. Nothing may be fed afterwards."""
        ...


class StepsParser:
    """Runs `_parse`, a generator over `self._reader`, which appends to `self._events` and returns at the end."""

    def __init__(self, max_held_chars: int) -> None:
        self._reader = TextReader(max_held_chars)
        self._events: list[Event] = []
        self._steps: Steps[None] = self._parse()
        next(self._steps, None)

    def _parse(self) -> Steps[None]:
        raise NotImplementedError

    def feed(self, text: str) -> list[Event]:
        if text:
            self._reader.feed(text)
            next(self._steps, None)
        return self._taken()

    def finish(self) -> list[Event]:
        self._reader.end()
        for _ in self._steps:
            raise AssertionError("a parser waits for text after the end")
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return joined(events) if len(events) > 1 else events

    def _content(self, text: str) -> None:
        if text:
            self._events.append(Content(text))
