import asyncio
from pathlib import Path
from typing import Any

import pytest

from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph.neighbour import Neighbour
from stator.graph.node import Node, ServeOptions, prepare
from stator.graph.planes import Planes
from stator.graph.token import TOKEN_KEY
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo
from stator.queue.memory import MemoryQueue
from stator.runtime.directory import register_instance
from stator.testing.clock import run_virtual
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.settings import Identity

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "llm"


class Client:
    """Knows what it was opened with."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.closed = asyncio.Event()

    def open(self, target: Any, request: Any, sink: Any, *, context: Any, item_type: Any = Any) -> Any:
        return self.token

    async def close(self) -> None:
        self.closed.set()


def token_of(neighbour: Neighbour) -> Any:
    nothing: Any = None
    return neighbour.open(nothing, None, nothing, context=nothing)


def test_a_token_that_the_other_namespace_draws_later_is_used_from_then_on() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        own, made = Client("own"), list[Client]()

        def with_token(token: str) -> Client:
            made.append(Client(token))
            return made[-1]

        neighbour = Neighbour("b", own, MemoryDiscovery(store), with_token)
        await neighbour.start()
        await neighbour.directory.wait_for(lambda d: d.synced, 5)
        assert token_of(neighbour) == "own"
        theirs = MemoryDiscovery(store)
        await theirs.put("token-of-something-else", b"no")
        await theirs.put(TOKEN_KEY, b"drawn")
        await own.closed.wait()
        assert token_of(neighbour) == "drawn"
        await theirs.put(TOKEN_KEY, b"drawn")
        await theirs.put(TOKEN_KEY, b"drawn anew")
        await made[0].closed.wait()
        assert [client.token for client in made] == ["drawn", "drawn anew"]
        assert not made[1].closed.is_set()
        await neighbour.close()
        assert made[1].closed.is_set()
        await theirs.close()

    run_virtual(main())


def test_instances_are_shown_once_the_token_is_known() -> None:
    async def main() -> None:
        store = MemoryKeyStore()
        theirs = MemoryDiscovery(store)
        info = InstanceInfo(InstanceId("p"), "P", "processor", (), (), "h", 1)
        await register_instance(theirs, await theirs.grant_lease(), info)
        await theirs.put(TOKEN_KEY, b"drawn")
        neighbour = Neighbour("b", Client("own"), MemoryDiscovery(store), Client)
        tokens: list[str] = []
        neighbour.directory.subscribe(lambda _: tokens.append(token_of(neighbour)))
        await neighbour.start()
        await neighbour.directory.wait_for(lambda d: d.instances() == [info], 5)
        assert tokens == ["drawn"]
        await neighbour.close()
        await theirs.close()

    run_virtual(main())


class Refusing(MemoryDiscovery):
    def __init__(self, code: ErrorCode) -> None:
        super().__init__(MemoryKeyStore())
        self.code = code

    async def get(self, key: str) -> Any:
        raise StatorError(self.code, "not for you")


def test_a_namespace_that_may_not_be_looked_into_is_a_mistake_of_the_configuration() -> None:
    async def main() -> None:
        refused = Neighbour("b", Client("own"), Refusing(ErrorCode.UNAUTHORIZED))
        with pytest.raises(ConfigError, match="namespace b: not for you"):
            await refused.start()
        away = Neighbour("b", Client("own"), Refusing(ErrorCode.INSTANCE_LOST))
        await away.start()
        for neighbour in (refused, away):
            await neighbour.close()

    run_virtual(main())


def test_planes_that_know_no_others_say_so() -> None:
    async def main() -> None:
        network = InProcessNetwork()
        client = RequestPlaneClient(Identity(), network=network)
        planes = Planes(client, network, MemoryDiscovery(MemoryKeyStore()), lambda _: MemoryQueue())
        with pytest.raises(ConfigError, match="has no others"):
            await planes.neighbour("b")
        await planes.close()

    run_virtual(main())


def node_of(*namespaces: str) -> Node:
    overrides = (("--Frontend.namespaces", f"[{', '.join(namespaces)}]"),)
    return prepare(
        ServeOptions("graphs.agg_router:Frontend", EXAMPLES, Path("configs/tiny-sim.yaml"), overrides, "mine"),
        for_start=False,
    )


def test_a_heads_hub_takes_the_namespaces_that_its_frontend_lists() -> None:
    assert node_of().guests() == []
    assert node_of("b", "mine", "a", "b").guests() == ["b", "a"]
    with pytest.raises(ConfigError, match=r"Frontend.namespaces: a/b: expected 1 to 63 letters"):
        node_of("a/b")
