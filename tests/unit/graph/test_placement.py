from pathlib import Path
from typing import Any

import pytest

from stator.config.load import Section
from stator.config.schema import FrontendConfig, Resources, ServiceArgs
from stator.errors import ConfigError
from stator.graph import depends, service
from stator.graph.banner import join_lines
from stator.graph.gpus import Gpu
from stator.graph.graph import build_graph
from stator.graph.placement import THREAD_VARIABLES, equip, plan_processes


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


def test_what_may_run_beside_its_successor() -> None:
    def overlapping(frontend: Any = None, **args: ServiceArgs) -> set[str]:
        graph = build_graph(Frontend)
        sections = {name: Section(args.get(name, ServiceArgs()), None) for name in graph.services}
        sections["Frontend"] = Section(args.get("Frontend", ServiceArgs()), frontend or FrontendConfig())
        plans = equip(plan_processes(graph, sections), [Gpu(str(n), str(n)) for n in range(4)])
        return {p.label for p in plans if p.overlaps}

    assert overlapping() == {"Frontend:1"}
    assert overlapping(Router=ServiceArgs(colocate=False)) == {"Frontend:1", "Router:1"}
    assert overlapping(frontend={"port": 1}) == set(), "it may have an address of its own"
    assert overlapping(Router=ServiceArgs(colocate=False, resources=Resources(gpu=1))) == {"Frontend:1"}


def test_colocation_and_copies_are_chosen_in_the_configuration() -> None:
    assert plan(
        Processor=ServiceArgs(colocate=False, workers=2),
        Decode=ServiceArgs(workers=0),
        Prefill=ServiceArgs(colocate=True),
    ) == [
        ("Frontend:1", 0, ("Frontend",)),
        ("Processor:1", 1, ("Processor",)),
        ("Processor:2", 1, ("Processor",)),
        ("Router:1", 2, ("Router",)),
    ]


def test_several_frontend_processes_share_one_router() -> None:
    assert plan(Frontend=ServiceArgs(workers=2)) == [
        ("Frontend:1", 0, ("Frontend", "Processor")),
        ("Frontend:2", 0, ("Frontend", "Processor")),
        ("Router:1", 1, ("Router",)),
        ("Decode:1", 2, ("Decode",)),
        ("Prefill:1", 3, ("Prefill",)),
    ]


def equipped(num_gpus: int, **args: ServiceArgs) -> dict[str, dict[str, str]]:
    graph = build_graph(Frontend)
    sections = {name: Section(args.get(name, ServiceArgs()), None) for name in graph.services}
    gpus = [Gpu(str(index)) for index in range(num_gpus)]
    return {p.label: p.environment for p in equip(plan_processes(graph, sections), gpus)}


def test_processes_see_the_gpus_they_were_given() -> None:
    four = ServiceArgs(resources=Resources(gpu=4), envs={"A": "1"})
    half = ServiceArgs(workers=2, resources=Resources(gpu=0.5, cpu=2.5))
    assert equipped(8, Decode=four, Prefill=half) == {
        "Frontend:1": {"CUDA_VISIBLE_DEVICES": ""},
        "Decode:1": {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "A": "1"},
        **{
            f"Prefill:{index}": {
                "CUDA_VISIBLE_DEVICES": "4",
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                **dict.fromkeys(THREAD_VARIABLES, "2"),
            }
            for index in (1, 2)
        },
    }
    assert set(map(str, equipped(8).values())) == {"{}"}


def test_what_colocated_services_ask_for_is_added() -> None:
    args = ServiceArgs(envs={"A": "1"}, resources=Resources(cpu=1))
    more = ServiceArgs(envs={"B": "2", "CUDA_VISIBLE_DEVICES": "7"}, resources=Resources(gpu=1, cpu=2))
    assert equipped(1, Frontend=args, Processor=more)["Frontend:1"] == {
        **dict.fromkeys(THREAD_VARIABLES, "3"),
        "CUDA_VISIBLE_DEVICES": "7",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "A": "1",
        "B": "2",
    }


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
    with pytest.raises(ConfigError, match=r"Router\.ServiceArgs\.colocate is true, but Frontend has 2 processes"):
        plan(Frontend=ServiceArgs(workers=2), Router=ServiceArgs(colocate=True))
    with pytest.raises(ConfigError, match=r"Processor\.ServiceArgs\.python is p, but Processor runs in .* Frontend"):
        plan(Processor=ServiceArgs(python="p"))
    with pytest.raises(ConfigError, match=r"Processor\.ServiceArgs\.envs sets A, and so does Frontend"):
        plan(Processor=ServiceArgs(envs={"A": "1"}), Frontend=ServiceArgs(envs={"A": "2"}))
