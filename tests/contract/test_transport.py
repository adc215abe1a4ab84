"""The transport contract on every carrier, and a part of it on uvloop."""

import asyncio

import pytest
import uvloop

from stator.testing.contracts.transport import CHECKS, Check
from stator.testing.contracts.transport_sockets import SOCKET_CHECKS
from stator.testing.contracts.transport_world import Carrier

SOCKETS = (Carrier.UNIX, Carrier.TCP, Carrier.TLS)
UVLOOP_CHECKS = {
    "items_arrive_in_order_before_one_end",
    "cancel_reaches_the_handler",
    "a_paused_stream_holds_up_only_itself",
    "many_streams_at_once",
    "large_requests_and_too_large_ones",
    "closing_the_server",
    "closing_the_client",
    "one_frame_and_one_write_per_loop_iteration",
    "a_lost_connection_ends_its_streams",
    "a_silent_peer_is_lost_on_both_sides",
    "a_peer_that_reads_nothing_is_dropped",
    "only_holders_of_the_token_are_served",
}


def name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("carrier", Carrier, ids=name)
@pytest.mark.parametrize("check", CHECKS, ids=name)
def test_contract(check: Check, carrier: Carrier) -> None:
    asyncio.run(check(carrier))


@pytest.mark.parametrize("carrier", SOCKETS, ids=name)
@pytest.mark.parametrize("check", SOCKET_CHECKS, ids=name)
def test_socket_contract(check: Check, carrier: Carrier) -> None:
    asyncio.run(check(carrier))


@pytest.mark.parametrize("carrier", SOCKETS, ids=name)
@pytest.mark.parametrize("check", [c for c in CHECKS + SOCKET_CHECKS if c.__name__ in UVLOOP_CHECKS], ids=name)
def test_contract_on_uvloop(check: Check, carrier: Carrier) -> None:
    uvloop.run(check(carrier))


def test_every_uvloop_check_exists() -> None:
    assert {check.__name__ for check in CHECKS + SOCKET_CHECKS} >= UVLOOP_CHECKS
