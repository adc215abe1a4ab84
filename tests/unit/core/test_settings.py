"""Settings: values, documents, and what one process makes of what a store tells it."""

import json
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.config.decode import unwrap
from stator.config.schema import ProcessorConfig, RouterConfig, RouterName, VllmWorkerConfig
from stator.core.key_store import KeyValue, WatchBatch
from stator.core.settings import (
    MAX_NUMBER,
    SETTINGS,
    Changed,
    Document,
    InvalidSetting,
    KnownSettings,
    Lost,
    RefusedDocument,
    Setting,
    Value,
    WriteBack,
    decode,
    encode,
    next_version,
)

LENGTH = SETTINGS["max-local-prefill-length"]
MODE = SETTINGS["router-mode"]
DISAGG = SETTINGS["conditional-disagg"]


def put(setting: Setting, version: int, value: Value | None, *, reset: bool = False) -> WatchBatch:
    return raw(setting, encode(Document(version, value)), reset=reset)


def raw(setting: Setting, data: bytes, *, reset: bool = False) -> WatchBatch:
    return WatchBatch(puts=[KeyValue(setting.key, data, 1)], reset=reset)


EMPTY = WatchBatch(reset=True)


# Values.


@pytest.mark.parametrize(
    ("setting", "text", "value"),
    [
        (LENGTH, "0", 0),
        (LENGTH, " 512 ", 512),
        (DISAGG, "on", True),
        (DISAGG, "False", False),
        (MODE, "round-robin", "round-robin"),
    ],
)
def test_what_is_typed(setting: Setting, text: str, value: Value) -> None:
    assert setting.parse(text) is value or setting.parse(text) == value
    assert type(setting.parse(text)) is type(value)


@pytest.mark.parametrize(
    ("setting", "text", "expected"),
    [
        (LENGTH, "-1", "found -1, expected a number from 0 to 1000000000"),
        (LENGTH, "12.5", "found 12.5"),
        (LENGTH, "true", "found true"),
        (LENGTH, str(MAX_NUMBER + 1), f"found {MAX_NUMBER + 1}"),
        (LENGTH, "9" * 500, "found 999"),
        (LENGTH, "²", "found ²"),
        (LENGTH, "", "found , expected"),
        (DISAGG, "1", "found 1, expected true or false"),
        (MODE, "KV", "found KV, expected one of kv, round-robin, random, least-loaded"),
    ],
)
def test_what_is_typed_wrongly(setting: Setting, text: str, expected: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{setting.name}: ") as caught:
        setting.parse(text)
    assert expected in str(caught.value) and len(str(caught.value)) < 250


def test_settings_are_what_sections_may_say() -> None:
    """The same defaults and bounds as the configuration's, so that a valid one is a valid other."""
    hints: dict[str, Any] = get_type_hints(VllmWorkerConfig, include_extras=True)
    fields = {field: VllmWorkerConfig(model="m") for field in ("max_local_prefill_length", "max_prefill_queue_size")}
    for field, config in fields.items():
        setting = SETTINGS[field.replace("_", "-")]
        assert getattr(config, field) == setting.default
        _, meta = unwrap(hints[field])
        assert next(m.ge for m in meta if m.ge is not None) == 0, "0 is the least of a setting as well"
    assert VllmWorkerConfig(model="m").conditional_disagg is SETTINGS["conditional-disagg"].default
    assert MODE.choices == get_args(RouterName)
    assert ProcessorConfig(model="m").router == MODE.default and "mode" in RouterConfig.__struct_fields__


# Documents.


@given(st.sampled_from([LENGTH, SETTINGS["max-prefill-queue-size"]]), st.integers(0, MAX_NUMBER), st.integers(1, 2**52))
def test_documents_come_back(setting: Setting, value: int, version: int) -> None:
    assert decode(setting, encode(Document(version, value))) == Document(version, value)


@given(st.binary(max_size=80) | st.builds(lambda value: json.dumps(value).encode(), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["version", "value", "x"]), inner),
)))  # fmt: skip
def test_anything_may_be_in_the_store(data: bytes) -> None:
    for setting in SETTINGS.values():
        known = KnownSettings()
        known.receive(put(setting, 5, setting.default))
        effects = known.receive(raw(setting, data))
        try:
            document = decode(setting, data)
        except InvalidSetting as error:
            assert effects == [RefusedDocument(setting.name, str(error))] and known.refused(setting.name)
            assert known.value(setting.name) == setting.default and "expected" in str(error)
        else:
            assert document.value is None or setting.check(document.value) == document.value


@pytest.mark.parametrize(
    "data",
    [
        b"512",
        b'{"value": 512}',
        b'{"version": 0, "value": 512}',
        b'{"version": 1e30, "value": 512}',
        b'{"version": 1, "value": -1}',
        b'{"version": 1, "value": true}',
        b'{"version": 1, "value": "512"}',
        b'{"version": 1, "value": [1]}',
        b"\xff\xfe",
    ],
)
def test_documents_that_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidSetting, match=r"^max-local-prefill-length: found .* expected"):
        decode(LENGTH, data)


def test_versions_only_grow() -> None:
    assert next_version(None, 1_700_000_000_000) == 1_700_000_000_000
    assert next_version(Document(5, 1), 1_700_000_000_000) == 1_700_000_000_000
    assert next_version(Document(1_700_000_000_000, 1), 1_600_000_000_000) == 1_700_000_000_001
    assert next_version(None, -5) == 1, "whatever the clock says"


# What one process knows.


def test_set_changed_and_unset() -> None:
    known = KnownSettings()
    assert known.receive(EMPTY) == [] and known.value(LENGTH.name) is None
    assert known.receive(put(LENGTH, 1, 512)) == [Changed(LENGTH.name, 512)]
    assert known.receive(put(LENGTH, 2, 512)) == [], "the same again"
    assert known.document(LENGTH.name) == Document(2, 512)
    assert known.receive(put(LENGTH, 3, None)) == [Changed(LENGTH.name, None)]
    assert known.value(LENGTH.name) is None and known.write_back(LENGTH.name) is None
    assert known.receive(put(DISAGG, 1, False)) == [Changed(DISAGG.name, False)], "off is not the same as not set"


def test_names_of_other_versions_are_left_alone() -> None:
    other = Setting("no-such-setting", 1, "")
    known = KnownSettings()
    assert known.receive(put(other, 1, 5)) == [] and known.receive(WatchBatch(deletes=[other.key, "settings/"])) == []


def test_a_bad_value_is_refused_once_and_the_last_good_one_stays() -> None:
    known = KnownSettings()
    known.receive(put(LENGTH, 1, 512))
    (refused,) = known.receive(raw(LENGTH, b"64"))
    assert isinstance(refused, RefusedDocument) and known.value(LENGTH.name) == 512
    assert known.receive(raw(LENGTH, b"64", reset=True)) == [], "told already"
    assert known.refused(LENGTH.name) and known.write_back(LENGTH.name) is None, "somebody has to look at it"
    (other,) = known.receive(raw(LENGTH, b"65"))
    assert isinstance(other, RefusedDocument)
    assert known.receive(put(LENGTH, 2, 64)) == [Changed(LENGTH.name, 64)] and not known.refused(LENGTH.name)
    assert isinstance(known.receive(raw(LENGTH, b"65"))[0], RefusedDocument), "a new mistake is told again"


@pytest.mark.parametrize("loss", [EMPTY, WatchBatch(deletes=[LENGTH.key])])
def test_what_is_lost_is_written_back(loss: WatchBatch) -> None:
    known = KnownSettings()
    known.receive(put(LENGTH, 7, 512))
    assert known.receive(loss) == [Lost(LENGTH.name)]
    assert known.value(LENGTH.name) == 512, "in force meanwhile"
    assert known.write_back(LENGTH.name) == WriteBack(LENGTH.key, encode(Document(7, 512)), only_if_absent=True)
    assert known.receive(put(LENGTH, 7, 512)) == [] and known.write_back(LENGTH.name) is None, "somebody did"


def test_an_unset_one_is_written_back_too() -> None:
    """Or a process that was cut off would bring back the value of before."""
    known = KnownSettings()
    known.receive(put(LENGTH, 7, None))
    assert known.receive(EMPTY) == [Lost(LENGTH.name)]
    assert known.write_back(LENGTH.name) == WriteBack(LENGTH.key, encode(Document(7, None)), only_if_absent=True)


def test_an_older_one_is_not_applied_and_gives_way() -> None:
    known = KnownSettings()
    known.receive(put(LENGTH, 7, 512))
    assert known.receive(put(LENGTH, 6, 64, reset=True)) == [Lost(LENGTH.name)]
    assert known.value(LENGTH.name) == 512
    assert known.write_back(LENGTH.name) == WriteBack(LENGTH.key, encode(Document(7, 512)), only_if_absent=False)
    assert known.receive(put(LENGTH, 8, 32)) == [Changed(LENGTH.name, 32)], "set meanwhile"
    assert known.write_back(LENGTH.name) is None


def test_a_newer_one_than_was_lost_counts() -> None:
    known = KnownSettings()
    known.receive(put(LENGTH, 7, 512))
    known.receive(EMPTY)
    assert known.receive(put(LENGTH, 9, 64)) == [Changed(LENGTH.name, 64)] and known.write_back(LENGTH.name) is None


@given(st.permutations([1, 2, 3, 4]), st.lists(st.booleans(), min_size=4, max_size=4))
def test_whatever_the_order_the_newest_counts(order: list[int], resets: list[bool]) -> None:
    known = KnownSettings()
    for version, reset in zip(order, resets, strict=True):
        known.receive(put(LENGTH, version, version, reset=reset))
    assert known.document(LENGTH.name) == Document(4, 4)
    if order[-1] != 4:
        assert known.write_back(LENGTH.name) == WriteBack(LENGTH.key, encode(Document(4, 4)), only_if_absent=False)
