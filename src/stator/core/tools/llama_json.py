"""Llama 3 and 4, JSON form: the whole answer is `{"name": "f", "parameters": {…}}`, several separated by `;`.

`<|python_tag|>` may stand before it. Without that tag nothing but its looks tells a call from an answer in JSON, so a
call must be the first thing in the output and name a declared function; with the tag, text may come before.
"""

from stator.core.tools.base import CallParser
from stator.core.tools.reader import Markers, Steps

TAG = "<|python_tag|>"
_TAGS = Markers(TAG)
_MEMBERS = ("type", "id")


class LlamaJsonParser(CallParser):
    _tagged = False

    def _may_be_called(self, name: str) -> bool:
        return self._tagged or name in self._tools

    def _may_be_a_member(self, key: str) -> bool:
        # An answer in JSON must not wait for its end to be shown.
        return self._tagged or key in _MEMBERS

    def _parse(self) -> Steps[None]:
        yield from self._attempt(self._untagged())
        while (yield from self._reader.until(_TAGS, self._content)):
            self._tagged = True
            yield from self._attempt(self._calls(), TAG)

    def _untagged(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._calls()

    def _calls(self) -> Steps[None]:
        yield from self._reader.space()
        yield from self._object_call()
        while (yield from self._attempt(self._next_call())):
            pass

    def _next_call(self) -> Steps[None]:
        """Parallel calls; some models repeat the tag."""
        yield from self._reader.space()
        yield from self._reader.expect(";", ",", TAG)
        yield from self._reader.space()
        yield from self._reader.accept(TAG)
        yield from self._reader.space()
        yield from self._object_call()
