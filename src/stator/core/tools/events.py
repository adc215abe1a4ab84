"""What parsers of a model's output produce, in the order of the output."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote to think, without the markup around it."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """index: 0 for the output's first call. Exactly one CallEnded with that index follows, before the next start."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the arguments' JSON text. A piece may end anywhere, inside an escape too."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """complete: the arguments are whole; otherwise they stop where the output broke off."""

    index: int
    complete: bool = True


Event = Reasoning | Content | CallStarted | CallArguments | CallEnded


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring texts of one kind put together."""
    out: list[Event] = []
    pieces: list[str] = []
    for event in events:
        if isinstance(event, (CallStarted, CallEnded)):
            _close(out, pieces)
            out.append(event)
            continue
        last = out[-1] if out else None
        if not (pieces and last is not None and _continues(last, event)):
            _close(out, pieces)
            out.append(event)
        pieces.append(event.text)
    _close(out, pieces)
    return out


def _continues(last: Event, event: Event) -> bool:
    if isinstance(last, CallArguments) and isinstance(event, CallArguments):
        return last.index == event.index
    return type(last) is type(event)


def _close(out: list[Event], pieces: list[str]) -> None:
    if len(pieces) > 1:
        text = "".join(pieces)
        last = out[-1]
        if isinstance(last, CallArguments):
            out[-1] = CallArguments(last.index, text)
        else:
            out[-1] = Reasoning(text) if isinstance(last, Reasoning) else Content(text)
    pieces.clear()
