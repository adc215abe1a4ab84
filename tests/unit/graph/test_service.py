from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import ConfigError
from stator.graph import depends, endpoint, on_start, service
from stator.graph.graph import build_graph
from stator.graph.service import EndpointStyle, is_service, spec_of
from stator.runtime.context import CallContext
from stator.transport.base import Call


@service
class Worker:
    pass


@service(name="Way", role="router", colocate=True)
class Way:
    worker = depends(Worker)


@service
class Front:
    way = depends(Way)
    worker = depends(Worker)


def test_a_service_is_the_class_itself() -> None:
    assert isinstance(Worker(), Worker)
    spec = spec_of(Way)
    assert (spec.name, spec.role, spec.colocate, spec.dependencies) == ("Way", "router", True, {"worker": Worker})
    assert spec_of(Worker).role == "worker"


def test_a_subclass_is_a_service_when_it_is_decorated() -> None:
    class Derived(Worker):
        pass

    assert not is_service(Derived)
    with pytest.raises(ConfigError, match="Derived is not a service"):
        spec_of(Derived)


def test_endpoints_take_their_types_from_annotations_or_the_decorator() -> None:
    @service
    class Some:
        @endpoint
        async def one(self, request: int) -> str:
            return str(request)

        @endpoint(name="many-more")
        async def many(self, request: int, context: CallContext) -> AsyncIterator[float]:
            yield request / 2

        @endpoint(request=bytes, item=int)
        def push(self, call: Call) -> None:
            call.end()

    specs = {e.name: e for e in spec_of(Some).endpoints}
    assert (specs["one"].style, specs["one"].request_type, specs["one"].item_type) == (EndpointStyle.SINGLE, int, str)
    many = specs["many-more"]
    assert (many.style, many.request_type, many.item_type, many.takes_context) == (
        EndpointStyle.STREAM, int, float, True,
    )  # fmt: skip
    assert (specs["push"].style, specs["push"].request_type, specs["push"].item_type) == (
        EndpointStyle.PUSH, bytes, int,
    )  # fmt: skip


def test_endpoints_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a push endpoint .* needs `@endpoint\(request="):

        @service
        class Push:
            @endpoint
            def push(self, call: Call) -> None: ...

    with pytest.raises(ConfigError, match="takes 0 arguments besides self"):

        @service
        class Empty:
            @endpoint
            async def nothing(self) -> None: ...

    with pytest.raises(ConfigError, match="two endpoints named 'same'"):

        @service
        class Twice:
            @endpoint
            async def same(self, request: int) -> int:
                return request

            @endpoint(name="same")
            async def other(self, request: int) -> int:
                return request


def test_links_chain_and_activate_dependencies() -> None:
    @service
    class Entry:
        way = depends(Way)
        worker = depends(Worker)

    assert Entry.link(Way).link(Worker) is Worker  # type: ignore[attr-defined]
    Entry.link(Way)  # type: ignore[attr-defined]
    graph = build_graph(Entry)
    assert list(graph.services) == ["Entry", "Way", "Worker"]
    assert not graph.is_component
    assert {k: (s.name, on) for k, (s, on) in graph.resolve(spec_of(Entry)).items()} == {
        "way": ("Way", True),
        "worker": ("Worker", True),
    }


def test_a_dependency_outside_the_graph_is_inactive_unless_the_target_is_a_component() -> None:
    @service
    class Direct:
        way = depends(Way)
        worker = depends(Worker)

    assert build_graph(Direct).resolve(spec_of(Direct))["way"] == (spec_of(Way), True)
    Direct.link(Worker)  # type: ignore[attr-defined]
    graph = build_graph(Direct)
    assert graph.resolve(spec_of(Direct)) == {"way": (spec_of(Way), False), "worker": (spec_of(Worker), True)}


def test_a_derived_service_takes_its_bases_place() -> None:
    @service
    class Mine(Worker):
        pass

    @service
    class User:
        worker = depends(Worker)

    User.link(Mine)  # type: ignore[attr-defined]
    assert build_graph(User).resolve(spec_of(User))["worker"] == (spec_of(Mine), True)


def test_a_link_without_a_dependency_names_both() -> None:
    with pytest.raises(ConfigError, match=r"Worker\.link\(Way\): Worker does not depend on Way"):
        Worker.link(Way)  # type: ignore[attr-defined]

    class Plain:
        pass

    with pytest.raises(ConfigError, match="Plain is not a service"):
        Front.link(Plain)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="not a service"):
        depends(Plain)


def test_two_services_of_one_name() -> None:
    other: Any = service(name="Worker")(type("Other", (), {}))

    @service
    class Both:
        a = depends(Worker)
        b = depends(other)

    Both.link(Worker)  # type: ignore[attr-defined]
    Both.link(other)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="two services of this graph are named 'Worker'"):
        build_graph(Both)


def test_a_dependency_is_read_too_early() -> None:
    @service
    class Early:
        worker = depends(Worker)

        @on_start
        def start(self) -> None: ...

    with pytest.raises(RuntimeError, match=r"Early\.worker is connected when the service is started"):
        _ = Early().worker
