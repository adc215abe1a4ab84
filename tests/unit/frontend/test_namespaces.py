import asyncio
import json
from collections.abc import Sequence

import msgspec
from frontend_fakes import AsgiClient, chat_body, say

from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import ErrorCode, StatorError
from stator.frontend.app import FrontendApp
from stator.frontend.health import ModelHealth, NamespaceHealth
from stator.frontend.namespaces import Namespaces, cards_of, health_of_all, served_by
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.lora import LoraAdapter
from stator.messages.openai import ChatCompletionRequest, ModelCard
from stator.observability.metrics import Metrics
from stator.runtime.directory import InstanceDirectory, register_instance
from stator.transport import (
    Call,
    Endpoint,
    Identity,
    InProcessNetwork,
    Listen,
    RequestPlaneClient,
    RequestPlaneServer,
    Target,
)


def instance(role: str, model: str | None = None, name: str = "i", addresses: Sequence[str] = ()) -> InstanceInfo:
    return InstanceInfo(InstanceId(name), "S", role, tuple(addresses), ("chat",), "h", 1, InstanceState.READY, model)


PROCESSOR = instance("processor")


def whole(*models: str) -> list[InstanceInfo]:
    return [instance("processor", models[0]), *(instance("decode", model) for model in models)]


def test_a_model_is_served_by_the_namespace_that_has_it():
    spaces = [whole("a"), whole("b", "b2"), whole("c")]
    assert served_by(spaces) == {"a": 0, "b": 1, "b2": 1, "c": 2}
    assert [card.id for card in cards_of(spaces, 5)] == ["a", "b", "b2", "c"]


def test_of_two_with_the_same_model_the_first_that_can_finish_a_request_serves_it():
    assert served_by([whole("m"), whole("m")]) == {"m": 0}
    assert served_by([whole("a"), whole("m"), whole("m")])["m"] == 1
    without_worker = [instance("processor", "m")]
    assert served_by([without_worker, whole("m")]) == {"m": 1}
    assert served_by([without_worker, without_worker]) == {"m": 0}
    assert cards_of([whole("m"), whole("m")], 5) == [ModelCard("m", 5)]


def test_workers_without_a_processor_are_not_reached():
    spaces = [whole("a"), [instance("decode", "b")]]
    assert served_by(spaces) == {"a": 0}
    assert [card.id for card in cards_of(spaces, 5)] == ["a"]
    # Our own may be in this process.
    assert [card.id for card in cards_of([[instance("decode", "a")], []], 5)] == ["a"]


def test_a_processor_without_workers_answers_for_its_model_but_does_not_list_it():
    spaces = [whole("a"), [instance("processor", "b")]]
    assert served_by(spaces) == {"a": 0, "b": 1}
    assert [card.id for card in cards_of(spaces, 5)] == ["a"]


def test_an_adapter_is_served_where_its_model_is():
    there = whole("a")
    there[1] = msgspec.structs.replace(there[1], adapters=(LoraAdapter("odd", "/x"),))
    spaces = [whole("b"), there]
    assert served_by(spaces) == {"a": 1, "b": 0, "odd": 1}
    assert [(card.id, card.parent) for card in cards_of(spaces, 5)] == [("a", None), ("b", None), ("odd", "a")]


def test_health_tells_of_each_namespace_and_of_each_model():
    spaces = {"own": whole("a", "m"), "other": [*whole("m"), instance("prefill", "m")], "empty": []}
    report = health_of_all(spaces)
    assert report.ready
    assert report.models == {"a": ModelHealth(1, 0), "m": ModelHealth(2, 1)}
    assert report.namespaces == {
        "own": NamespaceHealth(True, {"a": ModelHealth(1, 0), "m": ModelHealth(1, 0)}),
        "other": NamespaceHealth(True, {"m": ModelHealth(1, 1)}),
        "empty": NamespaceHealth(False, {}),
    }
    assert report.reasons == [
        "namespace empty: no processor instance is ready",
        "namespace empty: no worker is ready",
    ]


def test_a_frontend_is_ready_when_any_namespace_is():
    assert health_of_all({"own": [], "other": whole("m")}).ready
    assert not health_of_all({"own": [], "other": [instance("decode", "m")]}).ready
    assert health_of_all({"own": whole("m")}).namespaces == {}


class Place:
    """A namespace with a Processor on the in-process carrier, whose text is its name."""

    def __init__(self, namespace: str, network: InProcessNetwork) -> None:
        self.namespace = namespace
        self.network = network
        self.discovery = MemoryDiscovery(MemoryKeyStore())
        self.directory = InstanceDirectory(self.discovery)
        self.client = RequestPlaneClient(Identity(namespace), network=network)
        self.open = self.client.open
        self.script = say(namespace)
        identity = Identity(namespace, InstanceId(f"{namespace}-processor"))
        self.server = RequestPlaneServer(identity, Listen(host=None, inproc_name=namespace), network=network)
        self.server.register(Endpoint("chat", ChatCompletionRequest, lambda call: self.script(call)))

    async def start(self) -> None:
        await self.server.start()
        await self.directory.start()
        self.lease = await self.discovery.grant_lease()

    async def show(self, role: str, model: str) -> None:
        info = instance(role, model, f"{self.namespace}-{role}", self.server.addresses)
        await register_instance(self.discovery, self.lease, info)
        await self.directory.wait_for(lambda d: d.get(info.instance_id) == info, 5)

    async def leave(self) -> None:
        await self.lease.revoke()
        await self.directory.wait_for(lambda d: not d.instances(), 5)

    def targets(self, endpoint: str) -> list[Target]:
        return [Target(self.server.addresses, endpoint)]

    async def close(self) -> None:
        for closing in (self.directory, self.discovery, self.client, self.server):
            await closing.close()


def unknown(call: Call) -> None:
    call.end(StatorError(ErrorCode.MODEL_NOT_FOUND, "no such model among mine", param="model"))


def test_requests_reach_the_namespace_of_their_model():
    async def main() -> None:
        network = InProcessNetwork()
        own, other = Place("own", network), Place("other", network)
        for place in (own, other):
            await place.start()
        served = Namespaces(
            "own", directory=own.directory, client=own.client, targets=own.targets, others=[other], created=5
        )
        app = FrontendApp(
            client=served.client,
            targets=own.targets,
            models=served.models,
            health=served.health,
            metrics=(metrics := Metrics()),
            of_model=served.of_model,
            everywhere=served.everywhere,
        )

        async def ask(model: str) -> tuple[int, str]:
            answer = await AsgiClient(app).request("POST", "/v1/chat/completions", chat_body(model=model))
            found = answer.json
            return answer.status, found["choices"][0]["message"]["content"] if "choices" in found else found["error"][
                "message"
            ]

        ready = asyncio.get_running_loop().create_task(served.ready())
        await own.show("processor", "x")
        await own.show("decode", "x")
        assert await ready == "x"
        await other.show("processor", "y")
        await other.show("decode", "y")
        assert await ask("x") == (200, "own")
        assert await ask("y") == (200, "other")
        own.script = unknown
        assert await ask("z") == (404, "The model 'z' does not exist. Models served here: x, y.")
        assert {target.instance_id for target in served.everywhere("chat")} == {None, "other-processor"}
        listed = await AsgiClient(app).request("GET", "/v1/models")
        assert [card["id"] for card in listed.json["data"]] == ["x", "y"]
        health = json.loads((await AsgiClient(app).request("GET", "/health")).body)
        assert health["namespaces"]["other"] == {"ready": True, "models": {"y": {"decode": 1, "prefill": 0}}}
        assert b'stator_requests_total{code="200",endpoint="chat",model="y"} 1.0' in metrics.render()
        await other.leave()
        assert await ask("y") == (404, "The model 'y' does not exist. Models served here: x.")
        served.close()
        for place in (own, other):
            await place.close()

    asyncio.run(main())


def test_without_others_nothing_is_in_between():
    async def main() -> None:
        own = Place("own", InProcessNetwork())
        served = Namespaces("own", directory=own.directory, client=own.client, targets=own.targets, created=5)
        assert served.client is own.client
        assert served.of_model("anything") == own.targets
        await own.close()

    asyncio.run(main())
