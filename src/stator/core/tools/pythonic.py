"""Llama 3.2 and 4, pythonic form: `[f(a=1), g(b="x", c=[True, None])]`.

Llama 4 puts it between `<|python_start|>` and `<|python_end|>`. Without those, a call is told by its looks: the list
must be the first thing in the output and begin with a declared function.

Arguments are Python literals, written as JSON while they are read: strings with Python's escapes, numbers, True, False,
None, lists, tuples and dicts. Their types are as written; the tool's schema is not consulted.
"""

from stator.core.tools.base import MAX_NAME_CHARS, CallParser
from stator.core.tools.json_text import quoted
from stator.core.tools.python_text import copy_literal
from stator.core.tools.reader import Markers, NotACall, Steps, run_of

START = "<|python_start|>"
END = "<|python_end|>"
_STARTS = Markers(START)
_NAME = run_of(r"\w.\-")
_KEYWORD = run_of(r"\w")


class PythonicParser(CallParser):
    _tagged = False

    def _parse(self) -> Steps[None]:
        yield from self._attempt(self._untagged())
        while (yield from self._reader.until(_STARTS, self._content)):
            self._tagged = True
            if (yield from self._attempt(self._untagged(), START)):
                yield from self._closing(END)

    def _untagged(self) -> Steps[None]:
        reader = self._reader
        yield from reader.space()
        yield from reader.expect("[")
        yield from self._call()
        while (yield from self._attempt(self._next_call())):
            pass
        yield from self._attempt(self._list_end())

    def _next_call(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._reader.expect(",")
        yield from self._call()

    def _list_end(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._reader.accept(",")
        yield from self._reader.space()
        yield from self._reader.expect("]")

    def _call(self) -> Steps[None]:
        reader = self._reader
        yield from reader.space()
        name = yield from reader.run(_NAME, MAX_NAME_CHARS)
        if not name or (not self._tagged and name not in self._tools):
            raise NotACall
        yield from reader.space()
        yield from reader.expect("(")
        yield from reader.space()
        keyword = yield from self._keyword()
        self._start(name)
        self._arguments("{")
        separator = ""
        while keyword:
            self._arguments(f"{separator}{quoted(keyword)}: ")
            separator = ", "
            yield from copy_literal(reader, self._arguments)
            yield from reader.space()
            keyword = "" if (yield from reader.expect(",", ")")) == ")" else (yield from self._keyword())
        self._arguments("}")
        self._end()

    def _keyword(self) -> Steps[str]:
        """`name =`, or "" with the closing bracket consumed."""
        reader = self._reader
        yield from reader.space()
        name = yield from reader.run(_KEYWORD, MAX_NAME_CHARS)
        yield from reader.space()
        if not name:
            yield from reader.expect(")")
            return ""
        yield from reader.expect("=")
        yield from reader.space()
        return name
