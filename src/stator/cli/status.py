"""`stator status`: what a deployment consists of now. The schema of `--json` is described in docs/guide/operating.md;
fields are only ever added to it."""

import asyncio
from collections.abc import Callable, Iterable

import msgspec
from rich.console import Console
from rich.table import Table

from stator.cli.control import ControlOptions, Deployment, connected
from stator.cli.control_plane import ANSWER_TIMEOUT_S
from stator.errors import StatorError
from stator.messages.engine import EngineLoad
from stator.messages.instances import STATUS_ENDPOINT, InstanceInfo, InstanceState, InstanceStatus, StatusRequest
from stator.messages.reports import ReportRequest, WorkerReport

SCHEMA = 1
WATCH_EVERY_S = 2.0
REPORT_ENDPOINT = "report"
WORKER_ROLES = ("decode", "prefill")


class LeaseView(msgspec.Struct, frozen=True):
    """Seconds. age_s: etcd does not tell it."""

    ttl_s: float
    left_s: float
    age_s: float | None


class DrainView(msgspec.Struct, frozen=True):
    """phase: successor, draining, drained or cut_off."""

    phase: str
    num_open: int
    elapsed_s: float
    restart: bool


class EngineView(msgspec.Struct, frozen=True):
    """prefix_hit_rate: of the prompt tokens since the start, 0 to 1; null before the first."""

    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_used: int
    kv_blocks_held: int
    kv_usage: float
    prefix_hit_rate: float | None
    steps: int


class InstanceView(msgspec.Struct, frozen=True):
    """answers: whether it answered within ANSWER_TIMEOUT_S; if not, what only it knows is null."""

    id: str
    service: str
    role: str
    host: str
    pid: int
    state: str
    model: str | None
    answers: bool
    uptime_s: float | None
    num_open: int | None
    stalls: int | None
    drain: DrainView | None
    engine: EngineView | None
    lease: LeaseView | None


class QueueView(msgspec.Struct, frozen=True):
    name: str
    waiting: int
    in_flight: int
    dead_letters: int


class HubView(msgspec.Struct, frozen=True):
    """epoch: of this incarnation, in hexadecimal."""

    address: str
    epoch: str
    uptime_s: float


class ExternalView(msgspec.Struct, frozen=True):
    """etcd, nats: addresses. queues_unknown: why nothing is known of the queues; null if it is."""

    etcd: tuple[str, ...]
    nats: tuple[str, ...]
    queues_unknown: str | None


class Status(msgspec.Struct, frozen=True):
    """The document of `--json`. hub: null, and leases and queues unknown, for one that does not tell. external: etcd
    and NATS, in place of a hub."""

    schema: int
    namespace: str
    hub: HubView | None
    external: ExternalView | None
    instances: list[InstanceView]
    queues: list[QueueView]


async def read_status(options: ControlOptions) -> Status:
    """Raises ConfigError if the control plane cannot be reached."""
    async with connected(options) as deployment:
        return await status_of(deployment)


async def status_of(deployment: Deployment) -> Status:
    entries = await deployment.entries()
    lease_ids = {entry.lease_id for entry, _ in entries if entry.lease_id is not None}
    facts = await deployment.control.facts(lease_ids)
    asked = await asyncio.gather(*(_ask(deployment, info) for _, info in entries))
    leases = {
        lease_id: LeaseView(times.ttl_s, _s(times.left_s), None if times.age_s is None else _s(times.age_s))
        for lease_id, times in facts.leases.items()
    }
    instances = [
        _instance(info, *answers, leases.get(entry.lease_id) if entry.lease_id is not None else None)
        for (entry, info), answers in zip(entries, asked, strict=True)
    ]
    hub, services = facts.hub, facts.services
    return Status(
        SCHEMA,
        deployment.namespace,
        HubView(hub.address, f"{hub.epoch:x}", _s(hub.uptime_s)) if hub else None,
        ExternalView(services.etcd, services.nats, services.queue_error or None) if services else None,
        instances,
        [QueueView(q.name, q.waiting, q.in_flight, q.dead_letters) for q in facts.queues],
    )


async def _ask(deployment: Deployment, info: InstanceInfo) -> tuple[InstanceStatus | None, EngineLoad | None]:
    status = load = None
    try:
        if STATUS_ENDPOINT in info.endpoints:
            status = await deployment.ask(info, STATUS_ENDPOINT, StatusRequest(), InstanceStatus, ANSWER_TIMEOUT_S)
        if REPORT_ENDPOINT in info.endpoints and info.role in WORKER_ROLES:
            report: WorkerReport = await deployment.first(
                info, REPORT_ENDPOINT, ReportRequest(), WorkerReport, ANSWER_TIMEOUT_S
            )
            load = report.load
    except StatorError:
        return None, None
    return status, load


def _instance(
    info: InstanceInfo, status: InstanceStatus | None, load: EngineLoad | None, lease: LeaseView | None
) -> InstanceView:
    drain = status.drain if status is not None else None
    return InstanceView(
        info.instance_id,
        info.service,
        info.role,
        info.host,
        info.pid,
        info.state.value,
        info.model,
        status is not None,
        _s(status.uptime_s) if status is not None else None,
        status.num_open if status is not None else None,
        status.stalls if status is not None else None,
        DrainView(drain.phase.value, drain.num_open, _s(drain.elapsed_s), drain.restart) if drain is not None else None,
        _engine(load) if load is not None else None,
        lease,
    )


def _engine(load: EngineLoad) -> EngineView:
    return EngineView(
        load.num_running,
        load.num_waiting,
        load.num_blocks,
        load.num_blocks_used,
        load.num_blocks_held,
        _s(load.num_blocks_used / load.num_blocks) if load.num_blocks else 0.0,
        _s(load.prompt_tokens_cached_total / load.prompt_tokens_total) if load.prompt_tokens_total else None,
        load.steps_total,
    )


def _s(number: float) -> float:
    return round(number, 3)


async def watch_status(
    options: ControlOptions, show_status: Callable[[Status], None], complain: Callable[[str], None]
) -> None:
    """Shows it again every WATCH_EVERY_S, until it is cancelled. A control plane that is lost meanwhile is complained
    of, and asked again."""
    async with connected(options) as deployment:
        while True:
            try:
                show_status(await status_of(deployment))
            except StatorError as error:
                complain(f"{deployment.control.name}: {error.message}; trying again")
            await asyncio.sleep(WATCH_EVERY_S)


# For people.


def terminal() -> Console:
    """Lines in a pipe are as long as they are."""
    console = Console()
    return console if console.is_terminal else Console(width=400)


def show(status: Status, console: Console) -> None:
    hub = status.hub
    head = f"namespace {status.namespace}"
    if hub is not None:
        head += f", hub at {hub.address} up {_duration(hub.uptime_s)} (epoch {hub.epoch})"
    if (external := status.external) is not None:
        head += f", etcd at {', '.join(external.etcd)}, NATS at {', '.join(external.nats)}"
    console.print(head, highlight=False)
    console.print(_instances(status.instances) if status.instances else "no instances", highlight=False)
    if status.queues:
        console.print(_queues(status.queues), highlight=False)
    if external is not None and external.queues_unknown is not None:
        console.print(f"queues unknown: {external.queues_unknown}", highlight=False)


def _instances(instances: Iterable[InstanceView]) -> Table:
    table = _table(
        "INSTANCE", "ROLE", "HOST", "PID", "STATE", "MODEL", "OPEN", "RUN", "WAIT", "KV", "HIT", "LEASE", "UP"
    )
    for view in instances:
        engine, lease = view.engine, view.lease
        table.add_row(
            view.id,
            view.role,
            view.host,
            str(view.pid),
            _state(view),
            view.model or "",
            _number(view.num_open),
            _number(engine.running if engine else None),
            _number(engine.waiting if engine else None),
            f"{engine.kv_usage:.0%}" if engine else "",
            f"{engine.prefix_hit_rate:.0%}" if engine and engine.prefix_hit_rate is not None else "",
            f"{lease.left_s:.1f}/{lease.ttl_s:g} s" if lease else "",
            _duration(view.uptime_s) if view.uptime_s is not None else "",
        )
    return table


def _state(view: InstanceView) -> str:
    if view.drain is not None:
        return f"{view.drain.phase} {view.drain.elapsed_s:.0f} s" + (", restart" if view.drain.restart else "")
    if not view.answers:
        return f"{view.state}, silent"
    return f"{view.state}, {view.stalls} stalls" if view.stalls and view.state == InstanceState.READY else view.state


def _queues(queues: Iterable[QueueView]) -> Table:
    table = _table("QUEUE", "WAITING", "IN FLIGHT", "DEAD LETTERS")
    for queue in queues:
        table.add_row(queue.name, str(queue.waiting), str(queue.in_flight), str(queue.dead_letters))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
