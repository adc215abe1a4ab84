from pathlib import Path
from typing import Any

import pytest

from stator.config.load import Section
from stator.config.schema import ServiceArgs
from stator.errors import ConfigError
from stator.graph import depends, service
from stator.graph.banner import join_lines
from stator.graph.graph import build_graph
from stator.graph.placement import plan_processes


@service(role="prefill")
class Prefill: ...


@service(role="decode")
class Decode:
    prefill = depends(Prefill)


@service(role="router", colocate=True)
class Router:
    worker = depends(Decode)


@service(role="processor", colocate=True)
class Processor:
    router = depends(Router)


@service(role="frontend")
class Frontend:
    processor = depends(Processor)


root: Any = Frontend
root.link(Processor).link(Router).link(Decode).link(Prefill)


def plan(**args: ServiceArgs) -> list[tuple[str, int, tuple[str, ...]]]:
    graph = build_graph(Frontend)
    sections = {name: Section(args.get(name, ServiceArgs()), None) for name in graph.services}
    return [(p.label, p.stage, p.services) for p in plan_processes(graph, sections)]


def test_frontend_processor_and_router_share_a_process() -> None:
    assert plan() == [
        ("Frontend:1", 0, ("Frontend", "Processor", "Router")),
        ("Decode:1", 1, ("Decode",)),
        ("Prefill:1", 2, ("Prefill",)),
    ]


def test_colocation_and_copies_are_chosen_in_the_configuration() -> None:
    assert plan(
        Processor=ServiceArgs(colocate=False, workers=2),
        Decode=ServiceArgs(workers=0),
        Prefill=ServiceArgs(colocate=True),
    ) == [
        ("Frontend:1", 0, ("Frontend",)),
        ("Processor:1", 1, ("Processor", "Router")),
        ("Processor:2", 1, ("Processor", "Router")),
    ]


def test_a_component_has_a_process_though_it_would_be_colocated() -> None:
    graph = build_graph(Prefill)
    assert [p.label for p in plan_processes(graph, {"Prefill": Section(ServiceArgs(colocate=True), None)})] == [
        "Prefill:1"
    ]


def test_join_lines_name_what_more_nodes_may_run() -> None:
    @service(role="frontend")
    class Small:
        worker = depends(Decode)

    @service(role="decode")
    class Alone(Decode):
        other = depends(Prefill)

    small: Any = Small
    small.link(Alone)
    overrides = [
        ("--Alone.x", "1"), ("--Alone.ServiceArgs.workers", "0"), ("--Small.y", "2"), ("--Common.z", "a b"),
    ]  # fmt: skip
    lines = join_lines(build_graph(Small), Path("/d"), Path("c.yaml"), overrides)
    module = __name__
    assert [(line.what, line.command) for line in lines] == [
        ("Prefill", ("stator", "serve", f"{module}:Prefill", "-f", "c.yaml", "--Common.z=a b")),
        (
            "Alone",
            ("stator", "serve", f"{module}:{Alone.__qualname__}", "-f", "c.yaml", "--Alone.x=1", "--Common.z=a b"),
        ),
    ]


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match=r"Router\.ServiceArgs\.workers is 2, but Router runs in .* Frontend"):
        plan(Router=ServiceArgs(workers=2))
    with pytest.raises(ConfigError, match="one frontend a node"):
        plan(Frontend=ServiceArgs(workers=2))
