import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from stator.engines.transfer.messages import RELEASE_ENDPOINT, ReleaseRequest
from stator.engines.vllm.connectors import NIXL_CONNECTOR, STATOR_CONNECTOR
from stator.engines.vllm.transfer import (
    decode_params,
    parse_transfer,
    peer_alive,
    prefill_params,
    release,
    result_transfer,
)
from stator.ids import InstanceId, TransferId
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.transport import Call, Endpoint, Identity, Listen, RequestPlaneClient, RequestPlaneServer

REQUEST = make_request("r", list(range(10)), [50, 51])
NIXL = {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": 1, "remote_request_id": "v-1"}


def made(connector: str = NIXL_CONNECTOR, params: dict[str, Any] | None = None, cached: int = 4) -> dict[str, Any]:
    return result_transfer(
        params or NIXL, connector=connector, transfer_id=TransferId("t"), request=REQUEST, num_cached_tokens=cached
    )


def test_vllms_dict_goes_through_unread() -> None:
    params = {"anything": [1, {"x": None}], "do_remote_prefill": True}
    transfer = msgspec.msgpack.decode(msgspec.msgpack.encode(made(params=params)))
    assert transfer["transfer_id"] == "t"
    request = with_transfer(REQUEST, transfer)
    mine = decode_params(request, connector=NIXL_CONNECTOR)
    assert mine == params
    mine["do_remote_prefill"] = False
    assert request.transfer is not None
    assert request.transfer["params"] == params, "vLLM writes into its copy"
    parsed = parse_transfer(request, connector=NIXL_CONNECTOR)
    assert (parsed.num_tokens, parsed.num_cached_tokens) == (12, 4)


def test_a_prefill_names_its_transfer_to_ours_alone() -> None:
    assert prefill_params(STATOR_CONNECTOR, TransferId("t"))["transfer_id"] == "t"
    assert prefill_params(NIXL_CONNECTOR, TransferId("t")) == {"do_remote_decode": True, "do_remote_prefill": False}


def test_an_answer_without_blocks_is_said() -> None:
    with pytest.raises(ValueError, match="holds no KV blocks"):
        result_transfer(
            None, connector=NIXL_CONNECTOR, transfer_id=TransferId("t"), request=REQUEST, num_cached_tokens=0
        )


@pytest.mark.parametrize(
    ("request_", "connector", "change", "reason"),
    [
        (REQUEST, STATOR_CONNECTOR, {}, "made by NixlConnector"),
        (REQUEST, NIXL_CONNECTOR, {"num_tokens": 13}, "13 tokens"),
        (REQUEST, NIXL_CONNECTOR, {"num_tokens": 0}, "0 tokens"),
        (REQUEST, NIXL_CONNECTOR, {"num_tokens": 11}, "other tokens"),
        (REQUEST, NIXL_CONNECTOR, {"params": 3}, "not transfer parameters"),
        (make_request("r", list(range(9, 21))), NIXL_CONNECTOR, {}, "other tokens"),
        (make_request("r", list(range(10)), [50, 51], salt="s"), NIXL_CONNECTOR, {}, "cache salt"),
        (msgspec.structs.replace(REQUEST, lora_name="l"), NIXL_CONNECTOR, {}, "LoRA"),
    ],
)
def test_blocks_of_another_request_are_refused(
    request_: Any, connector: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_params(with_transfer(request_, {**made(), **change}), connector=connector)


def test_a_dead_peer_is_found_before_the_engine_meets_it() -> None:
    async def main() -> None:
        with socket.socket() as alive, socket.socket() as dead:
            for bound in (alive, dead):
                bound.bind(("127.0.0.1", 0))
            alive.listen()
            here, gone = (bound.getsockname()[1] for bound in (alive, dead))
            assert await peer_alive({"remote_host": "127.0.0.1", "remote_port": here})
            assert not await peer_alive({"remote_host": "127.0.0.1", "remote_port": gone})
            assert not await peer_alive({"remote_host": "127.0.0.1", "remote_port": 1 << 20})
            ours = [[f"tcp://127.0.0.1:{here}"], [f"tcp://127.0.0.1:{gone}"]]
            assert await peer_alive({"remote_addresses": ours[:1]})
            assert not await peer_alive({"remote_addresses": ours})
        assert await peer_alive({"remote_something": 1}), "another connector's: only the engine can tell"

    asyncio.run(main())


def test_a_peer_that_does_not_answer_is_given_up() -> None:
    async def main() -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            waiting = [socket.socket() for _ in range(8)]
            try:
                for one in waiting:
                    one.setblocking(False)
                    one.connect_ex(full.getsockname())
                params = {"remote_host": "127.0.0.1", "remote_port": full.getsockname()[1]}
                async with asyncio.timeout(5):
                    assert not await peer_alive(params, timeout_s=0.1)
            finally:
                for one in waiting:
                    one.close()

    asyncio.run(main())


def test_a_release_reaches_every_worker() -> None:
    async def main() -> None:
        released: list[str] = []

        def handle(call: Call) -> None:
            released.append(call.request.transfer_id)
            call.end(None)

        identity = Identity("n", InstanceId("p"), token="secret")
        servers = [RequestPlaneServer(identity, Listen()) for _ in range(2)]
        client = RequestPlaneClient(Identity("n", InstanceId("d"), token="secret"))
        for server in servers:
            server.register(Endpoint(RELEASE_ENDPOINT, ReleaseRequest, handle))
            await server.start()
        params = {
            "transfer_id": "t",
            "remote_instance_id": "p",
            "remote_addresses": [list(server.addresses) for server in servers],
            "remote_num_tokens": 12,
            "block_size": 4,
            "tp_size": 2,
            "pp_size": 1,
        }
        assert await release(client, made(STATOR_CONNECTOR, params))
        assert released == ["t", "t"]
        await servers[1].close()
        assert not await release(client, made(STATOR_CONNECTOR, params))
        assert not await release(client, {"transfer_id": "t"})
        await client.close()
        await servers[0].close()

    asyncio.run(main())


def test_nixl_is_asked_again_until_the_hold_has_begun() -> None:
    async def main() -> None:
        asked: list[Any] = []
        answers: list[list[bool]] = [[True, False], [True, True]]

        async def call_workers(method: str, args: tuple[Any, ...]) -> Sequence[bool]:
            asked.append((method, args))
            return answers.pop(0)

        async with asyncio.timeout(5):
            client = RequestPlaneClient(Identity())
            assert await release(client, made(), call_workers=call_workers)
            assert asked == [("stator_release_kv", ("v-1",))] * 2
            answers += [[False]] * 9
            assert not await release(client, made(), call_workers=call_workers)
            assert not await release(client, made()), "nobody to ask"
            await client.close()

    asyncio.run(main())
