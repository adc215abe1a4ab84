"""The first frames of a connection, as pure functions: what is said, what is proved, and why a peer is refused.

See messages.control for the order of the frames. The proofs cover every fixed field of Hello and Challenge, nonces
of both sides among them, so that a proof is worth nothing on another connection, for another role or namespace.
"""

import hmac

import msgspec

from stator.errors import ErrorCode, StatorError
from stator.messages.control import (
    MAJOR_VERSION,
    MINOR_VERSION,
    NONCE_BYTES,
    PROTOCOL,
    Challenge,
    HandshakeFrame,
    Hello,
    Preamble,
    Refused,
)
from stator.transport.base import Lane
from stator.transport.refusals import HUB_ROLE, TOKEN_SOURCES, wrong_namespace
from stator.transport.settings import Identity

CALLER = "caller"
SERVER = "server"

_LANES = frozenset(lane.value for lane in Lane)

_encoder = msgspec.msgpack.Encoder()
_preamble_decoder = msgspec.msgpack.Decoder(Preamble)
_decoder = msgspec.msgpack.Decoder[HandshakeFrame](HandshakeFrame)


def hello(identity: Identity, lane: Lane, nonce: bytes, max_frame_bytes: int) -> Hello:
    return Hello(
        PROTOCOL,
        MAJOR_VERSION,
        MINOR_VERSION,
        identity.role,
        identity.namespace,
        identity.instance_id,
        lane.value,
        nonce,
        max_frame_bytes,
    )


def challenge(
    identity: Identity, instance_id: str, nonce: bytes, max_frame_bytes: int, *, namespace: str | None = None
) -> Challenge:
    """namespace: the one that the connection is for, if the server takes callers of several."""
    namespace = identity.namespace if namespace is None else namespace
    return Challenge(MAJOR_VERSION, MINOR_VERSION, identity.role, namespace, instance_id, nonce, max_frame_bytes)


def proof(token: str, side: str, first: Hello, answer: Challenge) -> bytes:
    """What `side` (CALLER or SERVER) sends to show that it knows the token."""
    said = (
        side,
        first.protocol,
        first.major,
        first.role,
        first.namespace,
        first.instance_id,
        first.lane,
        first.nonce,
        answer.major,
        answer.role,
        answer.namespace,
        answer.instance_id,
        answer.nonce,
    )
    return hmac.digest(token.encode(), _encoder.encode(said), "sha256")


def proved(mac: bytes, token: str, side: str, first: Hello, answer: Challenge) -> bool:
    return hmac.compare_digest(mac, proof(token, side, first, answer))


def decode_first(frame: memoryview) -> Hello:
    """Raises StatorError(PROTOCOL), naming the version if it is another one, or msgspec.DecodeError."""
    preamble = _preamble_decoder.decode(frame)
    if preamble.protocol != PROTOCOL or preamble.kind != "hello":
        raise StatorError(ErrorCode.PROTOCOL, "the peer does not speak Stator's request plane protocol")
    if preamble.major != MAJOR_VERSION:
        raise StatorError(
            ErrorCode.PROTOCOL,
            f"the caller speaks version {preamble.major} of the request plane protocol and this server version "
            f"{MAJOR_VERSION}; run the same Stator release on all nodes",
        )
    first = _decoder.decode(frame)
    if not isinstance(first, Hello) or len(first.nonce) != NONCE_BYTES or first.lane not in _LANES:
        raise StatorError(ErrorCode.PROTOCOL, "the peer's first frame is not a valid hello")
    return first


def decode(frame: memoryview) -> HandshakeFrame:
    """Raises StatorError: what the peer refused us with. Raises msgspec.DecodeError."""
    message = _decoder.decode(frame)
    if isinstance(message, Refused):
        raise message.error.to_error()
    return message


def check_namespace(identity: Identity, first: Hello) -> None:
    if not identity.takes(first.namespace):
        raise wrong_namespace(identity.namespace, first.namespace, is_hub=identity.role == HUB_ROLE)


def check_challenge(identity: Identity, answer: Challenge) -> None:
    """Raises StatorError: PROTOCOL for another major version, UNAUTHORIZED for another namespace."""
    if answer.major != MAJOR_VERSION:
        raise StatorError(
            ErrorCode.PROTOCOL,
            f"the server speaks version {answer.major} of the request plane protocol and this caller version "
            f"{MAJOR_VERSION}; run the same Stator release on all nodes",
        )
    if answer.namespace != identity.namespace:
        raise wrong_namespace(answer.namespace, identity.namespace)
    if len(answer.nonce) != NONCE_BYTES:
        raise StatorError(ErrorCode.PROTOCOL, "the server's challenge is not valid")


def missing_token() -> StatorError:
    return StatorError(
        ErrorCode.UNAUTHORIZED, f"the server asks for a token and this process has none; {TOKEN_SOURCES}"
    )


def wrong_token_of_caller() -> StatorError:
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"the caller's token is not this deployment's; on the caller, {TOKEN_SOURCES}",
    )


def wrong_token_of_server() -> StatorError:
    return StatorError(
        ErrorCode.UNAUTHORIZED, f"the server could not prove that it knows this process's token; {TOKEN_SOURCES}"
    )
