"""Settings of a deployment that change while it runs. Pure.

Each setting is one key of the store, `settings/NAME`: a small JSON document, `{"version": NUMBER, "value": VALUE}`.
Where there is none, or its value is null (it was unset), what a process was configured with counts.

Rules:

- Nobody deletes a key of a setting: unsetting writes null. So a key that is missing although a process knows its
  document was lost with the store, and the processes that know it write it back.
- Versions order the documents of one setting. One is the time of writing in milliseconds, and more than that of the
  document which it replaces: a store that lost its state does not begin again below what processes know. A document
  older than the known one is not applied (the store was put back to an older copy); the known one is written back.
- A document that cannot be read, or has a value that is not valid, changes nothing: what was in force stays. It is told
  once, and left where it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from stator.core.key_store import KeyValue, WatchBatch
from stator.core.routing import RouterMode
from stator.errors import DECODE_ERRORS

Value = bool | int | str

SETTINGS_PREFIX = "settings/"
MAX_NUMBER = 1_000_000_000
MAX_VERSION = 1 << 53


class InvalidSetting(ValueError):
    """What was found and what was expected, for people."""


@dataclass(frozen=True, slots=True)
class Setting:
    """default: of a process that is configured with nothing, and the type of all values. choices: of a text."""

    name: str
    default: Value
    help: str
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return SETTINGS_PREFIX + self.name

    @property
    def expected(self) -> str:
        if isinstance(self.default, bool):
            return "true or false"
        return f"one of {', '.join(self.choices)}" if self.choices else f"a number from 0 to {MAX_NUMBER}"

    def check(self, value: object) -> Value:
        """Raises InvalidSetting."""
        match value:
            case bool():
                if isinstance(self.default, bool):
                    return value
            case int():
                if type(self.default) is int and 0 <= value <= MAX_NUMBER:
                    return value
            case str():
                if value in self.choices:
                    return value
            case _:
                pass
        raise InvalidSetting(f"{self.name}: found {shown(value)[:80]}, expected {self.expected}")

    def parse(self, text: str) -> Value:
        """As somebody types it. Raises InvalidSetting."""
        text = text.strip()
        if isinstance(self.default, bool) and text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if isinstance(self.default, int) and text.isascii() and text.isdecimal() and len(text) <= 20:
            return self.check(int(text))
        return self.check(text)


_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}

SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("conditional-disagg", False, "Decide for each prompt where it is prefilled; off: always remotely."),
        Setting(
            "max-local-prefill-length",
            1000,
            "Longest uncached part of a prompt, in tokens, that a decode worker prefills itself.",
        ),
        Setting("max-prefill-queue-size", 2, "Jobs in the prefill queue from which on prompts are prefilled locally."),
        Setting("router-mode", "kv", "How a decode worker is chosen.", tuple(RouterMode)),
    )
}


def shown(value: object) -> str:
    """As it is written in a configuration file."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


class Document(msgspec.Struct, frozen=True):
    """value: null if it was unset."""

    version: int
    value: Value | None


def encode(document: Document) -> bytes:
    return msgspec.json.encode(document)


def decode(setting: Setting, data: bytes) -> Document:
    """Raises InvalidSetting."""
    try:
        document = msgspec.json.decode(data, type=Document)
    except DECODE_ERRORS:
        found = data[:60].decode(errors="replace")
        raise InvalidSetting(
            f'{setting.name}: found {found!r}, expected {{"version": NUMBER, "value": {setting.expected}, or null}}'
        ) from None
    if not 0 < document.version < MAX_VERSION:
        raise InvalidSetting(
            f"{setting.name}: found version {document.version}, expected milliseconds since 1970, or any number above "
            f"the version before"
        )
    if document.value is not None:
        setting.check(document.value)
    return document


def next_version(before: Document | None, now_ms: int) -> int:
    return max(now_ms, 1 if before is None else before.version + 1)


# What one process knows.


@dataclass(frozen=True, slots=True)
class Changed:
    """value: None for what is configured."""

    name: str
    value: Value | None


@dataclass(frozen=True, slots=True)
class RefusedDocument:
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """The store lacks the document that is known, or has an older one: ask `write_back` after a little while."""

    name: str


Effect = Changed | RefusedDocument | Lost


@dataclass(frozen=True, slots=True)
class WriteBack:
    """only_if_absent: somebody may have been faster."""

    key: str
    data: bytes
    only_if_absent: bool


@dataclass(slots=True)
class _Known:
    """document: the newest good one. there: what the store has in its place; None: nothing. refused: told already."""

    document: Document | None = None
    there: bytes | None = None
    refused: bytes | None = None


class KnownSettings:
    """The settings as a watch of SETTINGS_PREFIX tells them. Names that this version does not know are left out."""

    def __init__(self, settings: Mapping[str, Setting] = SETTINGS) -> None:
        self._settings = {setting.key: setting for setting in settings.values()}
        self._known = {setting.name: _Known() for setting in settings.values()}

    def document(self, name: str) -> Document | None:
        """The newest good one that the store had."""
        return self._known[name].document

    def value(self, name: str) -> Value | None:
        """None: what is configured."""
        document = self._known[name].document
        return None if document is None else document.value

    def refused(self, name: str) -> bool:
        """Whether the store has something there that cannot be used."""
        known = self._known[name]
        return known.there is not None and known.there == known.refused

    def receive(self, batch: WatchBatch) -> list[Effect]:
        effects: list[Effect] = []
        put = {entry.key for entry in batch.puts}
        missing: Iterable[str] = self._settings.keys() - put if batch.reset else batch.deletes
        for key in sorted(missing):
            if (setting := self._settings.get(key)) is not None:
                known = self._known[setting.name]
                known.there = known.refused = None
                if known.document is not None:
                    effects.append(Lost(setting.name))
        for entry in batch.puts:
            effects += self._put(entry)
        return effects

    def _put(self, entry: KeyValue) -> list[Effect]:
        setting = self._settings.get(entry.key)
        if setting is None:
            return []
        known = self._known[setting.name]
        known.there = entry.value
        try:
            document = decode(setting, entry.value)
        except InvalidSetting as error:
            if entry.value == known.refused:
                return []
            known.refused = entry.value
            return [RefusedDocument(setting.name, str(error))]
        known.refused = None
        if known.document is not None and document.version < known.document.version:
            return [Lost(setting.name)]
        before, known.document = self.value(setting.name), document
        # Not ==: true is 1 there.
        return [] if shown(before) == shown(document.value) else [Changed(setting.name, document.value)]

    def write_back(self, name: str) -> WriteBack | None:
        """What to write to the store; None if it has what it should, or something that somebody has to look at."""
        known = self._known[name]
        if known.document is None or (known.there is not None and known.there == known.refused):
            return None
        setting = next(s for s in self._settings.values() if s.name == name)
        if known.there is not None and decode(setting, known.there).version >= known.document.version:
            return None
        return WriteBack(setting.key, encode(known.document), only_if_absent=known.there is None)
