"""`stator lora`: the LoRA adapters of a running deployment. What the commands do; `cli.lora_commands` declares them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from stator.cli.control import ControlOptions, Deployment, connected
from stator.errors import ConfigError, StatorError
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.lora import (
    LOAD_LORA_ENDPOINT,
    UNLOAD_LORA_ENDPOINT,
    LoadLora,
    LoraLoaded,
    LoraUnloaded,
    UnloadLora,
)

LOAD_TIMEOUT_S = 300.0
ANSWER_MARGIN_S = 30.0

EVERYWHERE = "all"

Say = Callable[[str], None]


class AdapterView(msgspec.Struct, frozen=True):
    """An adapter on one instance. model: that it is an adapter of."""

    name: str
    model: str | None
    instance: str
    role: str
    host: str
    path: str
    digest: str


class Change(msgspec.Struct, frozen=True):
    """What came of a load or an unload on one instance. outcome: `loaded`, `already_loaded`, `unloaded` or `failed`,
    with the error. num_ended: requests that had no time to finish."""

    instance: str
    host: str
    outcome: str
    error: str | None = None
    num_ended: int = 0

    @property
    def failed(self) -> bool:
        return self.error is not None


@dataclass(frozen=True, slots=True)
class LoraTarget:
    """instances: ids, or beginnings of them; `all`, or none, for all that there are."""

    name: str
    instances: tuple[str, ...] = ()


async def read_adapters(options: ControlOptions) -> list[AdapterView]:
    """By name and instance. Raises ConfigError."""
    async with connected(options) as deployment:
        found = [
            AdapterView(adapter.name, info.model, info.instance_id, info.role, info.host, adapter.path, adapter.digest)
            for _, info in await deployment.entries()
            for adapter in info.adapters
        ]
    return sorted(found, key=lambda view: (view.name, view.instance))


async def load(options: ControlOptions, what: LoraTarget, path: str, say: Say) -> list[Change]:
    """On all chosen workers at once. Raises ConfigError for instances that there are not, or a path that cannot be."""
    if not path.startswith("/"):
        raise ConfigError(f"{path} is not an absolute path; it is one on the workers' nodes, the same on each")

    async def one(deployment: Deployment, info: InstanceInfo) -> Change:
        request = LoadLora(what.name, path)
        loaded: LoraLoaded = await deployment.ask(info, LOAD_LORA_ENDPOINT, request, LoraLoaded, LOAD_TIMEOUT_S)
        return Change(info.instance_id, info.host, "already_loaded" if loaded.already else "loaded")

    async with connected(options) as deployment:
        workers = await _workers(deployment, LOAD_LORA_ENDPOINT)
        return await _on_each(deployment, choose(workers, what.instances), one, say)


async def unload(options: ControlOptions, what: LoraTarget, timeout_s: float, say: Say) -> list[Change]:
    """On all chosen workers that have it, at once. Raises ConfigError if none has it."""

    async def one(deployment: Deployment, info: InstanceInfo) -> Change:
        request, answer_s = UnloadLora(what.name, timeout_s), timeout_s + ANSWER_MARGIN_S
        done: LoraUnloaded = await deployment.ask(info, UNLOAD_LORA_ENDPOINT, request, LoraUnloaded, answer_s)
        return Change(info.instance_id, info.host, "unloaded", num_ended=done.num_ended)

    async with connected(options) as deployment:
        chosen = choose(await _workers(deployment, UNLOAD_LORA_ENDPOINT), what.instances)
        having = [info for info in chosen if info.adapter(what.name) is not None]
        if not having:
            raise ConfigError(f"no worker has the adapter {what.name!r}; `stator lora list` shows those that there are")
        return await _on_each(deployment, having, one, say)


def choose(workers: Sequence[InstanceInfo], names: Sequence[str]) -> list[InstanceInfo]:
    """Raises ConfigError for a name that means none or several, and if there is no worker at all."""
    known = "\n".join(f"  {info.instance_id} ({info.role}) on {info.host}" for info in workers) or "  there is none"
    if not workers:
        raise ConfigError("no worker that takes adapters is ready")
    if not names or EVERYWHERE in names:
        return list(workers)
    chosen: dict[str, InstanceInfo] = {}
    for name in names:
        exact = [info for info in workers if info.instance_id == name]
        found = exact or [info for info in workers if info.instance_id.startswith(name)]
        if len(found) != 1:
            what = f"{name} means {len(found)} workers" if found else f"no worker {name}"
            raise ConfigError(f"{what}; the workers:\n{known}")
        chosen[found[0].instance_id] = found[0]
    return list(chosen.values())


async def _workers(deployment: Deployment, endpoint: str) -> list[InstanceInfo]:
    infos = [info for _, info in await deployment.entries()]
    return [info for info in infos if info.state is InstanceState.READY and endpoint in info.endpoints]


async def _on_each(deployment: Deployment, instances: Sequence[InstanceInfo], one: Any, say: Say) -> list[Change]:
    async def bounded(info: InstanceInfo) -> Change:
        try:
            change: Change = await one(deployment, info)
        except StatorError as error:
            change = Change(info.instance_id, info.host, "failed", error.message)
        say(f"{info.instance_id} on {info.host}: {_in_words(change)}")
        return change

    return list(await asyncio.gather(*(bounded(info) for info in instances)))


def _in_words(change: Change) -> str:
    if change.error is not None:
        return f"failed: {change.error}"
    ended = f"; {change.num_ended} requests had no time to finish" if change.num_ended else ""
    return change.outcome.replace("_", " ") + ended


def differing(views: Sequence[AdapterView]) -> list[str]:
    """Names under which instances of one model have different adapters."""
    digests: dict[tuple[str, str | None], set[str]] = {}
    for view in views:
        digests.setdefault((view.name, view.model), set()).add(view.digest)
    return sorted({name for (name, _), found in digests.items() if len(found) > 1})


def show_adapters(views: Sequence[AdapterView], console: Console) -> None:
    if not views:
        console.print("no adapter is loaded")
        return
    table = Table(box=None, pad_edge=False)
    for header in ("adapter", "model", "instance", "role", "host", "path", "digest"):
        table.add_column(header, no_wrap=header != "path")
    for view in views:
        table.add_row(*(getattr(view, field) or "" for field in view.__struct_fields__))
    console.print(table)
    for name in differing(views):
        console.print(f"{name} is not the same adapter on all of them")
