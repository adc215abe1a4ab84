import logging
from typing import Any

import msgspec
import pytest

from stator.core.engine_blocks import EngineCleared, EngineRemoved, EngineStored
from stator.engines.vllm.kv_wire import (
    KvBatchDecoder,
    KvWireError,
    NumberedPayload,
    read_published,
    read_replayed,
    replay_request,
)

DIGEST = bytes(range(32))

# As vLLM 0.32 sends it, map and fields in its order.
MAP: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [2**64 - 1, 5],
    "parent_block_hash": 7,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [None, ["salt", ["image", 3], DIGEST]],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
    "kv_cache_spec_sliding_window": 4,
    "session_id": "x",
    "a field of tomorrow": {"a": [1]},
}


def payload(*events: Any, rank: int | None = 0) -> bytes:
    return msgspec.msgpack.encode([12.5, list(events), rank])


def fields(event: Any) -> dict[str, Any]:
    return msgspec.structs.asdict(event)


def test_maps_and_arrays_are_the_same_events() -> None:
    as_array = list(MAP.values())[:11]
    first, second = KvBatchDecoder().decode(payload(MAP, as_array))
    assert isinstance(first, EngineStored) and isinstance(second, EngineStored)
    assert fields(first) == fields(second)
    assert first.block_hashes == [2**64 - 1, 5] and first.parent_block_hash == 7
    assert first.extra_keys == [None, ["salt", ["image", 3], DIGEST]]
    removed, also = KvBatchDecoder().decode(
        payload(
            {"type": "BlockRemoved", "block_hashes": [DIGEST], "medium": "CPU", "group_idx": 1},
            ["BlockRemoved", [DIGEST], "CPU", 1],
        )
    )
    assert isinstance(removed, EngineRemoved) and fields(removed) == fields(also)
    cleared = KvBatchDecoder().decode(payload({"type": "AllBlocksCleared"}, ["AllBlocksCleared"]))
    assert [isinstance(event, EngineCleared) for event in cleared] == [True, True]


def test_the_oldest_arrays_end_early() -> None:
    (event,) = KvBatchDecoder().decode(msgspec.msgpack.encode([1.0, [["BlockStored", [1], None, [1, 2], 2, None]]]))
    assert isinstance(event, EngineStored)
    assert (event.medium, event.group_idx, event.extra_keys) == (None, None, None)


def test_unknown_events_are_left_out_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    decoder = KvBatchDecoder()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            events = decoder.decode(
                payload({"type": "BlockMoved", "x": 1}, ["BlockMoved", 1], {"type": "AllBlocksCleared"})
            )
            assert len(events) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "KV events of type 'BlockMoved' are unknown and ignored"
    ]


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode("batch"),
        msgspec.msgpack.encode([1.0]),
        payload(5),
        payload([]),
        payload({}),
        payload({"type": "BlockStored"}),
        payload({"type": "LaterEvent"}).replace(b"Later", b"Late\x80"),
        payload(MAP | {"token_ids": [-1]}),
        payload(MAP | {"token_ids": [2**32]}),
        payload(MAP | {"block_hashes": ["text"]}),
        payload(MAP)[:-3],
    ],
)
def test_malformed_batches_have_a_named_error(bad: bytes) -> None:
    with pytest.raises(KvWireError, match="KV event batch"):
        KvBatchDecoder().decode(bad)


def test_frames() -> None:
    number = (258).to_bytes(8, "big")
    assert read_published([b"topic", number, b"p"]) == NumberedPayload(258, b"p")
    assert read_replayed([b"", b"topic", number, b"p"]) == NumberedPayload(258, b"p")
    assert read_replayed([b"", b"", b"\xff" * 8, b""]).number is None
    assert replay_request(258) == [b"", number]


@pytest.mark.parametrize("frames", [[], [b"t", b"123", b"p"], [b"", b"t", b"12345678", b"p"]])
def test_other_frames_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(KvWireError, match="KV event message"):
        read_published(frames)


@pytest.mark.parametrize("frames", [[], [b"t", b"12345678", b"p"], [b"x", b"t", b"12345678", b"p"]])
def test_other_answers_are_refused(frames: list[bytes]) -> None:
    with pytest.raises(KvWireError, match="KV replay message"):
        read_replayed(frames)
