"""Length-prefixed msgpack: frames into one buffer, and bytes back into frames. Knows no socket."""

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.messages.control import DATA_KIND
from stator.transport.server_call import Entry

LENGTH = struct.Struct(">I")
ENCODE_ERRORS = (TypeError, ValueError, OverflowError, RecursionError)
"""What msgspec raises for an object that msgpack cannot carry."""

encoder = msgspec.msgpack.Encoder()


class FrameTooLong(Exception):
    """A frame past the bound of its connection."""

    def __init__(self, num_bytes: int, limit: int) -> None:
        super().__init__(f"a frame of {num_bytes} bytes is longer than the limit of {limit}")
        self.num_bytes = num_bytes


def append_frame(buffer: bytearray, message: Any, limit: int) -> None:
    """Append one frame, or leave the buffer as it was and raise FrameTooLong or one of ENCODE_ERRORS."""
    start = len(buffer)
    buffer += b"\0\0\0\0"
    try:
        encoder.encode_into(message, buffer, -1)
    except ENCODE_ERRORS:
        del buffer[start:]
        raise
    num_bytes = len(buffer) - start - LENGTH.size
    if num_bytes > limit:
        del buffer[start:]
        raise FrameTooLong(num_bytes, limit)
    LENGTH.pack_into(buffer, start, num_bytes)


def append_data(buffer: bytearray, entries: Sequence[Entry], limit: int) -> list[tuple[Entry, Exception]]:
    """Append entries as one data frame, or as few as fit the limit. Returns the entries that cannot be sent, and why.

    One encoding pass unless something is wrong: then the entries are halved until what is wrong stands alone.
    """
    try:
        append_frame(buffer, (DATA_KIND, entries), limit)
    except (FrameTooLong, *ENCODE_ERRORS) as error:
        if len(entries) > 1:
            middle = len(entries) // 2
            failed = append_data(buffer, entries[:middle], limit)
            return failed + append_data(buffer, entries[middle:], limit)
        entry = entries[0]
        if isinstance(error, FrameTooLong) and len(entry[1]) > 1:
            return _append_in_parts(buffer, entry, limit)
        return [(entry, error)]
    return []


def _append_in_parts(buffer: bytearray, entry: Entry, limit: int) -> list[tuple[Entry, Exception]]:
    items = entry[1]
    middle = len(items) // 2
    failed = append_data(buffer, [(entry[0], items[:middle])], limit)
    if failed:
        return failed
    rest: Any = (entry[0], items[middle:], *entry[2:])
    return append_data(buffer, [rest], limit)


def encode_request(endpoint: str, request: Any, limit: int) -> bytes:
    """Raises StatorError: BODY_TOO_LARGE, or INTERNAL for an object that msgpack cannot carry."""
    try:
        encoded = encoder.encode(request)
    except ENCODE_ERRORS as error:
        raise StatorError(ErrorCode.INTERNAL, f"the request for {endpoint} cannot be encoded: {error}") from error
    if len(encoded) > limit:
        raise StatorError(
            ErrorCode.BODY_TOO_LARGE,
            f"the request for {endpoint} is {len(encoded)} bytes long; the transport takes at most {limit}",
        )
    return encoded


class FrameSplitter:
    """Cuts a byte stream into frames; each byte is copied at most once more. limit may be changed between frames."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._wanted = LENGTH.size

    @property
    def num_buffered(self) -> int:
        return self._num_bytes

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """Yields each complete frame, without its length. Raises FrameTooLong as soon as a length says so."""
        if self._num_bytes + len(data) < self._wanted:
            self._parts.append(data)
            self._num_bytes += len(data)
            return
        if self._parts:
            self._parts.append(data)
            data = b"".join(self._parts)
            self._parts = []
        view = memoryview(data)
        position, end = 0, len(data)
        self._wanted = LENGTH.size
        while end - position >= LENGTH.size:
            (num_bytes,) = LENGTH.unpack_from(view, position)
            if num_bytes > self.limit:
                raise FrameTooLong(num_bytes, self.limit)
            if end - position < LENGTH.size + num_bytes:
                self._wanted = LENGTH.size + num_bytes
                break
            position += LENGTH.size
            yield view[position : position + num_bytes]
            position += num_bytes
        self._num_bytes = end - position
        if self._num_bytes:
            self._parts.append(data[position:])
