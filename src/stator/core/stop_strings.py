"""Finding stop strings in text that arrives in pieces.

Rules:
- The match is the stop string that is *completed* first; of several that end at one character, the longest. So the
  answer depends on the text alone, never on how it was cut, and generation stops as early as it can.
- Text before the match is emitted; the matched text and what follows it are not.
- Text is held back only while it may still become part of a match: exactly the longest suffix of what was fed that
  is a proper prefix of some stop string.

The automaton is Aho and Corasick's (1975): one step a character, whatever the stop strings. While nothing is held, a
regular expression skips to the next character that could begin a match, so ordinary text costs one search.
"""

import re
from collections import deque
from collections.abc import Sequence


class _Node:
    """One prefix of a stop string. match_chars: length of the longest stop string that ends here, 0 for none."""

    __slots__ = ("children", "depth", "fail", "match_chars")

    def __init__(self, depth: int) -> None:
        self.children: dict[str, _Node] = {}
        self.depth = depth
        self.fail: _Node = self
        self.match_chars = 0


class StopStringMatcher:
    """One per request. `matched` is the stop string found, None until then.

    stops: non-empty strings; none at all makes `feed` pass everything through.
    """

    __slots__ = ("_first", "_held", "_root", "_state", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self.matched: str | None = None
        self._held = ""
        self._root = self._state = _build(stops)
        first_chars = "".join(map(re.escape, self._root.children))
        self._first = re.compile(f"[{first_chars}]") if stops else None

    @property
    def held(self) -> str:
        """Text fed but neither emitted nor matched yet."""
        return self._held

    def feed(self, text: str) -> str:
        """The text that may be emitted now. After a match it is always empty."""
        if self._first is None:
            return text
        if self.matched is not None or not text:
            return ""
        buffer = self._held + text
        end = self._scan(buffer, len(self._held))
        if end is not None:
            start = end - self._state.match_chars
            self.matched = buffer[start:end]
            self._held = ""
            return buffer[:start]
        kept = self._state.depth
        if not kept:
            self._held = ""
            return buffer
        self._held = buffer[-kept:]
        return buffer[:-kept]

    def flush(self) -> str:
        """The stream ended: what was held back is text after all."""
        text, self._held, self._state = self._held, "", self._root
        return text

    def _scan(self, buffer: str, position: int) -> int | None:
        """Advance over buffer[position:]. The end of the first match, with the state left there, or None."""
        root, node, first = self._root, self._state, self._first
        assert first is not None
        while position < len(buffer):
            if node is root:
                found = first.search(buffer, position)
                if found is None:
                    break
                position = found.start()
            node = _step(node, buffer[position])
            position += 1
            if node.match_chars:
                self._state = node
                return position
        self._state = node
        return None


def _step(node: _Node, char: str) -> _Node:
    while (following := node.children.get(char)) is None:
        if node.depth == 0:
            return node
        node = node.fail
    return following


def _build(stops: Sequence[str]) -> _Node:
    root = _Node(0)
    for stop in stops:
        if not stop:
            raise ValueError("a stop string is empty")
        node = root
        for char in stop:
            node = node.children.setdefault(char, _Node(node.depth + 1))
        node.match_chars = len(stop)
    queue = deque([root])
    while queue:
        parent = queue.popleft()
        for char, node in parent.children.items():
            node.fail = _step(parent.fail, char) if parent is not root else root
            node.match_chars = node.match_chars or node.fail.match_chars
            queue.append(node)
    return root
