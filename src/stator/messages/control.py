"""The request plane's frames: what crosses a socket between two Stator processes.

Every frame is a 4-byte big-endian length and that many bytes of msgpack. A connection begins with four handshake
frames, in which each side proves that it knows the deployment's token without sending it:

    caller  -> Hello      who I am, which protocol, which namespace, my nonce
    server  -> Challenge  who I am, my nonce
    caller  -> Proof      HMAC-SHA256 over everything said so far, keyed with the token
    server  -> Welcome    the same from the other side (another label, so that neither can be replayed as the other)

At any point of it the server may answer `Refused` and close. Handshake frames are maps, so that any version of the
protocol can read the first fields of any other's; what follows are arrays that start with a number, the frame's kind.
In both, fields that a newer minor version adds are ignored; another major version is refused by name.
"""

from typing import Annotated

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId

PROTOCOL = "stator"
MAJOR_VERSION = 1
MINOR_VERSION = 0

NONCE_BYTES = 32
DATA_KIND = 2


class ErrorMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """A StatorError on its way. A code that this version does not know becomes INTERNAL."""

    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    instance_id: InstanceId | None = None

    @classmethod
    def of(cls, error: StatorError) -> "ErrorMessage":
        return cls(error.code.value, error.message, error.param, error.retry_after_s, error.instance_id)

    def to_error(self) -> StatorError:
        try:
            code = ErrorCode(self.code)
        except ValueError:
            code = ErrorCode.INTERNAL
        return StatorError(
            code, self.message, param=self.param, retry_after_s=self.retry_after_s, instance_id=self.instance_id
        )


class Preamble(msgspec.Struct, frozen=True):
    """What the first frame of every version can be read as."""

    kind: str
    protocol: str = ""
    major: int = 0


class Hello(msgspec.Struct, frozen=True, tag_field="kind", tag="hello"):
    """role: what the caller is, for logs ("processor", "prefill", ...). lane: see transport.base.Lane.

    max_frame_bytes: the longest item that the caller takes; 0 when it does not say.
    """

    protocol: str
    major: int
    minor: int
    role: str
    namespace: str
    instance_id: str
    lane: str
    nonce: bytes
    max_frame_bytes: int = 0


class Challenge(msgspec.Struct, frozen=True, tag_field="kind", tag="challenge"):
    """max_frame_bytes: the longest request that the server takes; 0 when it does not say."""

    major: int
    minor: int
    role: str
    namespace: str
    instance_id: str
    nonce: bytes
    max_frame_bytes: int = 0


class Proof(msgspec.Struct, frozen=True, tag_field="kind", tag="proof"):
    mac: bytes


class Welcome(msgspec.Struct, frozen=True, tag_field="kind", tag="welcome"):
    mac: bytes


class Refused(msgspec.Struct, frozen=True, tag_field="kind", tag="refused"):
    error: ErrorMessage


HandshakeFrame = Hello | Challenge | Proof | Welcome | Refused

StreamId = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Positive = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]


class Open(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Caller to server: begin a stream. stream_id: the caller's choice, never used twice on a connection.

    window: how many items the server may send before it gets credit. ms_left: until the deadline, None without one.
    instance_id: the instance that the caller means; another one answers STALE_INSTANCE.
    """

    stream_id: StreamId
    endpoint: str
    request: msgspec.Raw
    window: Positive
    request_id: str
    ms_left: float | None = None
    instance_id: str | None = None
    headers: dict[str, str] = {}


class DataEntry(msgspec.Struct, frozen=True, array_like=True):
    """items: an array, decoded by the stream they belong to. ended: nothing follows; error: why, None for normally."""

    stream_id: StreamId
    items: msgspec.Raw
    ended: bool = False
    error: ErrorMessage | None = None


class Data(msgspec.Struct, frozen=True, array_like=True, tag=DATA_KIND):
    """Server to caller: all that one iteration of the event loop produced for this connection.

    Sent as plain tuples `(DATA_KIND, [(stream_id, items[, ended[, error]]), ...])`, which encode to the same bytes
    without a second pass over the items.
    """

    entries: list[DataEntry]


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Caller to server: no more of this stream. Not answered; a stream that is gone is ignored."""

    stream_id: StreamId


class Credit(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Caller to server: so many items were taken and may be followed by as many."""

    stream_id: StreamId
    num_items: Positive


class Ping(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Either way, when nothing was sent for a while. Answered by Pong with the same number."""

    number: int = 0


class Pong(msgspec.Struct, frozen=True, array_like=True, tag=6):
    number: int = 0


class GoAway(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Server to caller: open no more streams here; those that are open go on.

    error: why the connection is closed, if it is closed at once because of the other side.
    """

    error: ErrorMessage | None = None


Frame = Open | Data | Cancel | Credit | Ping | Pong | GoAway
