"""Frames into bytes and back, in any cut."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.errors import ErrorCode, StatorError
from stator.messages.control import DATA_KIND, Data, ErrorMessage, Frame
from stator.transport.encoding import FrameSplitter, FrameTooLong, append_data, append_frame, encode_request


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[start:end] for start, end in zip(places, places[1:], strict=False)]


@given(payloads=st.lists(st.binary(max_size=40)), cuts=st.lists(st.integers(min_value=0, max_value=10_000)))
def test_frames_survive_any_cut(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)
    splitter = FrameSplitter(40)
    found = [bytes(frame) for part in cut(data, cuts) for frame in splitter.feed(part)]
    assert found == payloads
    assert splitter.num_buffered == 0


@given(num_before=st.integers(min_value=0, max_value=3), cuts=st.lists(st.integers(min_value=0, max_value=100)))
def test_a_frame_too_long_is_noticed_by_its_length(num_before: int, cuts: list[int]) -> None:
    data = b"\0\0\0\1x" * num_before + b"\0\0\0\x0b"
    splitter = FrameSplitter(10)
    found: list[bytes] = []
    with pytest.raises(FrameTooLong, match="11 bytes"):
        for part in cut(data, cuts):
            for frame in splitter.feed(part):
                found.append(bytes(frame))  # noqa: PERF401
    assert found == [b"x"] * num_before


def test_a_frame_that_fails_leaves_the_buffer_alone() -> None:
    buffer = bytearray()
    append_frame(buffer, [1], 10)
    before = bytes(buffer)
    with pytest.raises(FrameTooLong):
        append_frame(buffer, b"x" * 10, 10)
    with pytest.raises(TypeError):
        append_frame(buffer, [object()], 10)
    assert buffer == before


def read_back(buffer: bytearray, limit: int) -> tuple[dict[int, list[Any]], dict[int, ErrorMessage | None]]:
    items: dict[int, list[Any]] = {}
    ends: dict[int, ErrorMessage | None] = {}
    for frame in FrameSplitter(limit).feed(bytes(buffer)):
        data = msgspec.msgpack.decode(frame, type=Frame)
        assert isinstance(data, Data)
        for entry in data.entries:
            assert entry.stream_id not in ends, "items after the end"
            items.setdefault(entry.stream_id, []).extend(msgspec.msgpack.decode(entry.items))
            if entry.ended:
                ends[entry.stream_id] = entry.error
    return items, ends


@given(
    streams=st.lists(
        st.tuples(st.lists(st.one_of(st.binary(max_size=30), st.just(b"x" * 300), st.none())), st.booleans()),
        max_size=8,
    )
)
def test_entries_are_cut_to_the_limit_and_the_bad_ones_named(streams: list[tuple[list[Any], bool]]) -> None:
    """None stands for an object that cannot be encoded; 300 bytes are past the limit."""
    poison = object()
    entries: list[Any] = []
    for number, (items, ended) in enumerate(streams):
        sent = [poison if item is None else item for item in items]
        entries.append((number, sent, True) if ended else (number, sent))
    buffer = bytearray()
    failed = {entry[0] for entry, _ in append_data(buffer, entries, 100)}
    good = {number for number, (items, _) in enumerate(streams) if all(i is not None and len(i) < 300 for i in items)}
    assert failed == set(range(len(streams))) - good
    items, ends = read_back(buffer, 100)
    for number in good:
        assert items.get(number, []) == streams[number][0]
        assert (number in ends) == streams[number][1]


def test_plain_entries_are_what_data_declares() -> None:
    error = ErrorMessage(ErrorCode.OVERLOADED.value, "full", None, 1.5)
    encoded = msgspec.msgpack.encode((DATA_KIND, [(1, [7]), (2, [], True), (3, [8], True, error)]))
    found = msgspec.msgpack.decode(encoded, type=Frame)
    assert isinstance(found, Data)
    assert [(e.stream_id, bytes(e.items), e.ended, e.error) for e in found.entries] == [
        (1, b"\x91\x07", False, None),
        (2, b"\x90", True, None),
        (3, b"\x91\x08", True, error),
    ]


def test_a_request_past_the_limit_says_both_numbers() -> None:
    with pytest.raises(StatorError, match="203 bytes long; the transport takes at most 100") as caught:
        encode_request("run", b"x" * 201, 100)
    assert caught.value.code is ErrorCode.BODY_TOO_LARGE


def test_an_error_code_of_the_future_is_internal() -> None:
    assert ErrorMessage("gravity_lost", "it fell").to_error().code is ErrorCode.INTERNAL
    error = StatorError(ErrorCode.OVERLOADED, "full", param="n", retry_after_s=2.0)
    back = ErrorMessage.of(error).to_error()
    assert (back.code, back.message, back.param, back.retry_after_s) == (error.code, "full", "n", 2.0)
