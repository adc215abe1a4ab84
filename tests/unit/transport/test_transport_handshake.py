"""Who is let in, and what those are told who are not."""

import asyncio
from typing import Any

import msgspec
import pytest
from transport_raw_peer import IDENTITY, LIMIT, NONCE, frame, greeting, raw_server, ready_server

from stator.errors import ErrorCode, StatorError
from stator.messages import control
from stator.transport import handshake
from stator.transport.base import Lane

HELLO = handshake.hello(IDENTITY, Lane.CALLS, NONCE, LIMIT)
CHALLENGE = handshake.challenge(IDENTITY, IDENTITY.instance_id, bytes(range(32)), LIMIT)


def hello_fields(**changes: Any) -> dict[str, Any]:
    return {**msgspec.to_builtins(HELLO, builtin_types=(bytes,)), "kind": "hello", **changes}


def refusal(*frames: bytes) -> tuple[str, str]:
    """Code and message that a server answers these frames with."""

    async def run() -> tuple[str, str]:
        connection, transport = raw_server()
        for part in frames:
            connection.data_received(part)
        assert transport.is_closed and connection.is_closed
        await connection.closed
        last = transport.frames()[-1]
        assert last["kind"] == "refused"
        return last["error"]["code"], last["error"]["message"]

    return asyncio.run(run())


def test_a_proof_depends_on_everything_that_was_said() -> None:
    mac = handshake.proof("token", handshake.CALLER, HELLO, CHALLENGE)
    assert handshake.proved(mac, "token", handshake.CALLER, HELLO, CHALLENGE)
    assert not handshake.proved(mac, "other", handshake.CALLER, HELLO, CHALLENGE)
    assert not handshake.proved(mac, "token", handshake.SERVER, HELLO, CHALLENGE), "a proof could be sent back"
    for change in (
        {"nonce": bytes(31) + b"1"},
        {"namespace": "b"},
        {"instance_id": "x"},
        {"role": "b"},
        {"lane": "bulk"},
    ):
        changed = msgspec.structs.replace(HELLO, **change)
        assert not handshake.proved(mac, "token", handshake.CALLER, changed, CHALLENGE)
    for change in ({"nonce": bytes(32)}, {"namespace": "b"}, {"instance_id": "x"}, {"role": "b"}):
        changed_answer = msgspec.structs.replace(CHALLENGE, **change)
        assert not handshake.proved(mac, "token", handshake.CALLER, HELLO, changed_answer)


def test_another_major_version_is_refused_by_name() -> None:
    code, message = refusal(frame({"kind": "hello", "protocol": "stator", "major": 2, "shape": ["new"]}))
    assert code == ErrorCode.PROTOCOL and "version 2" in message and "version 1" in message
    with pytest.raises(StatorError, match=r"version 2 .* version 1"):
        handshake.check_challenge(IDENTITY, msgspec.structs.replace(CHALLENGE, major=2))


def test_a_newer_minor_version_with_new_fields_is_welcome() -> None:
    async def run() -> None:
        connection, transport = raw_server()
        connection.data_received(frame(hello_fields(minor=9, colour="blue")))
        _, proof = greeting()
        connection.data_received(proof)
        connection.flush()
        assert [message["kind"] for message in transport.frames()] == ["challenge", "welcome"]
        connection.abort()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("first", "code", "words"),
    [
        (hello_fields(namespace="other"), ErrorCode.UNAUTHORIZED, "--namespace"),
        (hello_fields(protocol="http"), ErrorCode.PROTOCOL, "does not speak"),
        (hello_fields(nonce=b"short"), ErrorCode.PROTOCOL, "not a valid hello"),
        (hello_fields(lane="fast"), ErrorCode.PROTOCOL, "not a valid hello"),
        (hello_fields(role=7), ErrorCode.PROTOCOL, "role"),
        (["open"], ErrorCode.PROTOCOL, "cannot be read"),
    ],
)
def test_a_bad_hello_is_refused(first: Any, code: ErrorCode, words: str) -> None:
    found, message = refusal(frame(first))
    assert found == code and words in message


def test_a_wrong_proof_is_refused_and_says_where_tokens_come_from() -> None:
    first, _ = greeting()
    code, message = refusal(first, frame(control.Proof(bytes(32))))
    assert code == ErrorCode.UNAUTHORIZED
    assert "STATOR_TOKEN" in message and "--token-file" in message and message != "token"


def test_nothing_is_served_before_the_proof() -> None:
    first, _ = greeting()
    code, _ = refusal(first, frame((1, 0, "echo", 1, 10, "r")))
    assert code == ErrorCode.PROTOCOL
    code, _ = refusal(frame({"kind": "proof", "mac": bytes(32)}))
    assert code == ErrorCode.PROTOCOL


def test_a_hello_is_short() -> None:
    code, message = refusal((1 << 20).to_bytes(4, "big"))
    assert code == ErrorCode.PROTOCOL and "longer than the limit" in message


def test_a_peer_that_says_nothing_is_given_up() -> None:
    async def run() -> None:
        connection, transport = raw_server(handshake_timeout_s=0.02)
        async with asyncio.timeout(5):
            await connection.closed
        assert "0.02 s" in transport.frames()[-1]["error"]["message"]

    asyncio.run(run())


def test_unknown_fields_of_later_frames_are_ignored() -> None:
    async def run() -> None:
        connection, transport = ready_server()
        connection.data_received(frame((1, 0, "echo", 5, 10, "r", None, None, {}, "from the future")))
        connection.flush()
        assert transport.frames() == [[2, [[0, [5], True]]]]
        connection.abort()

    asyncio.run(run())
