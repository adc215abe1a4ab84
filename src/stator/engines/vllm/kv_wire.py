"""vLLM's KV events as they are on the wire, decoded.

A published batch has the frames [topic, number as 8 bytes big-endian, payload]; an answer to a replay request the same
with an empty frame before them, and after the last one the number is -1. The payload is msgpack,
[time, [event, ...], data-parallel rank or nothing]. An event is a map with its name in `type` (vLLM 0.32) or an array
that begins with it (older ones; fields in the same order, missing ones at the end). Block hashes are integers, or bytes
with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0.

Source: vllm/distributed/kv_events.py and vllm/v1/core/block_pool.py of vLLM 0.32.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from stator.core.engine_blocks import EngineCleared, EngineEvent, EngineRemoved, EngineStored
from stator.errors import DECODE_ERRORS

logger = logging.getLogger(__name__)

_NUMBER_BYTES = 8


class KvWireError(ValueError):
    """What came is not what vLLM publishes."""


class _StoredMap(EngineStored, tag="BlockStored", frozen=True):
    pass


class _RemovedMap(EngineRemoved, tag="BlockRemoved", frozen=True):
    pass


class _ClearedMap(EngineCleared, tag="AllBlocksCleared", frozen=True):
    pass


class _StoredArray(EngineStored, tag="BlockStored", array_like=True, frozen=True):
    pass


class _RemovedArray(EngineRemoved, tag="BlockRemoved", array_like=True, frozen=True):
    pass


class _ClearedArray(EngineCleared, tag="AllBlocksCleared", array_like=True, frozen=True):
    pass


class _Batch(msgspec.Struct, array_like=True, frozen=True):
    time: float
    events: list[msgspec.Raw]
    data_parallel_rank: int | None = None


class _AnyMap(msgspec.Struct, frozen=True):
    type: str


class _AnyArray(msgspec.Struct, array_like=True, frozen=True):
    type: str


_KNOWN = {"BlockStored", "BlockRemoved", "AllBlocksCleared"}

_batch = msgspec.msgpack.Decoder(_Batch)
_map = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_array = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_any_map = msgspec.msgpack.Decoder(_AnyMap)
_any_array = msgspec.msgpack.Decoder(_AnyArray)


@dataclass(frozen=True, slots=True)
class NumberedPayload:
    """number: position in what the publisher sent since it started, from 0; None marks the end of a replay."""

    number: int | None
    payload: bytes


def read_published(frames: Sequence[bytes]) -> NumberedPayload:
    """Raises KvWireError."""
    if len(frames) != 3 or len(frames[1]) != _NUMBER_BYTES:
        raise KvWireError(f"a KV event message has frames of {_sizes(frames)} bytes; expected [topic, 8, payload]")
    return NumberedPayload(int.from_bytes(frames[1], "big"), frames[2])


def read_replayed(frames: Sequence[bytes]) -> NumberedPayload:
    """Raises KvWireError."""
    if len(frames) != 4 or frames[0] or len(frames[2]) != _NUMBER_BYTES:
        raise KvWireError(f"a KV replay message has frames of {_sizes(frames)} bytes; expected [0, topic, 8, payload]")
    number = int.from_bytes(frames[2], "big", signed=True)
    return NumberedPayload(None if number < 0 else number, frames[3])


def replay_request(first: int) -> list[bytes]:
    """Frames for a DEALER socket: all that is kept from number `first` on."""
    return [b"", first.to_bytes(_NUMBER_BYTES, "big")]


class KvBatchDecoder:
    """Payloads of one publisher. Events of names that we do not know are left out, and said once per name."""

    def __init__(self) -> None:
        self._unknown: set[str] = set()

    def decode(self, payload: bytes) -> list[EngineEvent]:
        """Raises KvWireError if it is not a batch, or a known event in it cannot be read."""
        try:
            batch = _batch.decode(payload)
            decoded = [self._event(raw) for raw in batch.events]
        except DECODE_ERRORS as error:
            # Not chained into what is shown: the message names the field, and tokens must not reach a log.
            raise KvWireError(f"a KV event batch of {len(payload)} bytes cannot be read: {error}") from None
        return [event for event in decoded if event is not None]

    def _event(self, raw: msgspec.Raw) -> EngineEvent | None:
        first = memoryview(raw)[0]
        # msgpack: 0x90..0x9f, 0xdc and 0xdd begin an array.
        is_array = 0x90 <= first <= 0x9F or first in (0xDC, 0xDD)
        try:
            return _array.decode(raw) if is_array else _map.decode(raw)
        except msgspec.ValidationError:
            name = (_any_array if is_array else _any_map).decode(raw).type
            if name in _KNOWN:
                raise
            if name not in self._unknown and len(self._unknown) < 16:
                self._unknown.add(name)
                logger.warning("KV events of type %.100r are unknown and ignored", name)
            return None


def _sizes(frames: Sequence[bytes]) -> list[int]:
    return [len(frame) for frame in frames[:8]]
