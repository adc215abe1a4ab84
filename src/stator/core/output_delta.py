"""Events of a parser as the fields of an answer: of one delta of a stream, and of a whole answer."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from stator.core.tools.events import CallArguments, CallEnded, CallStarted, Content, Event, Reasoning
from stator.core.tools.request import CallMode
from stator.errors import Ending
from stator.messages.tools import FunctionCall, ToolCall, ToolCallDelta


@dataclass(slots=True)
class OutputDelta:
    """What is new: text, reasoning, and pieces of calls, at most one piece for each call."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list[ToolCallDelta])

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)


def delta_of(events: Iterable[Event]) -> OutputDelta:
    """Events of one moment, put together: OpenAI's deltas do not order text and calls among each other either."""
    delta = OutputDelta()
    for event in events:
        match event:
            case Content(text):
                delta.text += text
            case Reasoning(text):
                delta.reasoning += text
            case CallStarted(index, call_id, name):
                delta.tool_calls.append(ToolCallDelta(index, call_id, name))
            case CallArguments(index, text):
                _add_arguments(delta.tool_calls, index, text)
            case CallEnded():
                pass
    return delta


def _add_arguments(pieces: list[ToolCallDelta], index: int, text: str) -> None:
    if pieces and pieces[-1].index == index:
        last = pieces[-1]
        pieces[-1] = ToolCallDelta(index, last.id, last.name, last.arguments + text)
    else:
        pieces.append(ToolCallDelta(index, arguments=text))


class CallCollector:
    """Puts the pieces of a stream's calls together, for an answer that is sent whole."""

    def __init__(self) -> None:
        self._heads: list[tuple[str, str]] = []
        self._arguments: list[list[str]] = []

    def add(self, pieces: Iterable[ToolCallDelta]) -> None:
        for piece in pieces:
            if piece.index == len(self._heads):
                self._heads.append((piece.id or "", piece.name or ""))
                self._arguments.append([])
            self._arguments[piece.index].append(piece.arguments)

    def calls(self) -> list[ToolCall]:
        return [
            ToolCall(call_id, FunctionCall(name, "".join(arguments)))
            for (call_id, name), arguments in zip(self._heads, self._arguments, strict=True)
        ]


def ending_with_calls(ending: Ending, num_calls: int, mode: CallMode) -> Ending:
    """An output that stopped and has calls ended for them, but where the client named the function: OpenAI says stop.

    `length` stays: its last call may have broken off.
    """
    if ending is Ending.STOP and num_calls and mode is not CallMode.NAMED:
        return Ending.TOOL_CALLS
    return ending
