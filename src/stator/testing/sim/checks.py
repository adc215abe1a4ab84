"""What must hold in every run, whatever goes wrong: watched while it runs, and looked at again when all is quiet.

A request may fail only for a reason that the schedule gives: its frontend or its client's connection broken, its
deadline over, no decode worker able to serve, more failures than it may migrate, a second engine crash.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from stator.core.hashing import block_hashes
from stator.graph.planes import Planes
from stator.ids import InstanceId
from stator.messages.engine import EngineRequest
from stator.messages.tokens import num_tokens, pack
from stator.router.index import STALE_BOUND_S
from stator.runtime.context import CallContext, loop_time
from stator.runtime.directory import DirectoryChange
from stator.testing.sim.cluster import NAMESPACE, TRANSFER_HOLD_S, Cluster, SimProcess
from stator.testing.sim.faults import Injector, Kind
from stator.testing.sim.loop import NodeState
from stator.testing.sim.workload import BLOCK_SIZE, SERVED_NAME, Request
from stator.transport.base import Sink, StreamHandle, Target, TransportClient
from stator.transport.settings import TransportSettings

SAMPLE_S = 0.25
MIGRATION_LIMIT = 3
LOST_WITHIN_S = 13.0
"""A peer that fell silent counts as lost after its heartbeat timeout or its lease."""

RELEASED_WITHIN_S = 1.0
"""Of the client's disconnect, if nothing is disturbed."""

HUB_SETTLES_WITHIN_S = 4.0
"""The return window of those who held leases, and a renewal."""

SETTLE_S = 0.5
MAX_REQUEST_S = 90.0
INDEX_SLACK_S = 0.75
_FRONT_FAULTS = frozenset({Kind.KILL, Kind.PAUSE, Kind.DRAIN, Kind.STUTTER, Kind.LOSE_HOST, Kind.CUT})


class _WatchedClient:
    """A process's transport client: what is opened through it is compared with what its directory has said.

    An instance that the directory does not show yet is no offence: a router may have heard of it first.
    """

    def __init__(self, inner: TransportClient, checks: "Checks", process: SimProcess, planes: Planes) -> None:
        self._inner = inner
        self._checks = checks
        self._process = process
        self._gone: set[InstanceId] = set()
        planes.directory.subscribe(self._changed)

    def _changed(self, change: DirectoryChange) -> None:
        self._gone |= {info.instance_id for info in change.removed}
        self._gone -= {info.instance_id for info in change.added}

    def open(
        self, target: Target, request: Any, sink: Sink, *, context: CallContext, item_type: Any = Any
    ) -> StreamHandle:
        if target.endpoint == "generate" and isinstance(request, EngineRequest):
            self._checks.trace.note(
                self._process.label,
                f"{context.request_id} -> {target.instance_id} with {num_tokens(request.resume_ids)} resumed",
            )
            if target.instance_id in self._gone:
                self._checks.violated(f"{context.request_id} was sent to {target.instance_id}, which has no lease")
        return self._inner.open(target, request, sink, context=context, item_type=item_type)

    async def close(self) -> None:
        await self._inner.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Checks:
    """violations: in the order they were found, each with its time."""

    def __init__(self, cluster: Cluster, injector: Injector, requests: Sequence[Request]) -> None:
        self.violations: list[str] = []
        self.trace = cluster.trace
        self.num_samples = 0
        self.no_worker_at: list[float] = []
        self.num_checked_claims = 0
        self._cluster = cluster
        self._injector = injector
        self._requests = requests
        self._by_name = {request.name: request for request in requests}
        self._seen: set[str] = set()
        self._settings = TransportSettings()
        self._index = _IndexCheck(self, cluster, requests)
        cluster.on_planes = self._on_planes

    def violated(self, what: str) -> None:
        if what not in self._seen:
            self._seen.add(what)
            self.violations.append(f"{loop_time():.3f} s: {what}")
            self.trace.note("VIOLATION", what)

    def _on_planes(self, process: SimProcess, planes: Planes) -> None:
        planes.client = _WatchedClient(planes.client, self, process, planes)

    # While it runs.

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.num_samples += 1
            self._sample()

    def _sample(self) -> None:
        now = loop_time()
        workers = self._cluster.of_kind("VllmWorker")
        if not any(self._serves(process) for process in workers):
            self.no_worker_at.append(now)
        self._index.sample(now)
        for number, ends in self._cluster.network.connections.items():
            for end in ends:
                if end.get_write_buffer_size() > self._settings.max_write_buffer_bytes + 1024 * 1024:
                    self.violated(f"connection {number} of {end.node.name} holds more than its bound of bytes")
        for process in workers + self._cluster.of_kind("PrefillWorker"):
            self._check_released(process, now)

    def _serves(self, process: SimProcess) -> bool:
        return process.ready and process.num_disturbed == 0

    def _check_released(self, process: SimProcess, now: float) -> None:
        """No engine works for a request that ended a while ago."""
        component = process.component(process.names[0])
        if component is None or process.node is None or process.node.state is not NodeState.RUNNING:
            return
        for request_id in list(component.engine._streams):
            request = self._by_name.get(_name_in(request_id))
            ended_at = None if request is None else request.answer.ended_at
            if ended_at is None:
                continue
            # A job whose end a hub that stood still has not heard of is handed out, and ended by its decode worker.
            prompt = self._undisturbed_since(ended_at - LOST_WITHIN_S) and not self._hub_away(
                Kind.HUB_PAUSE, ended_at, now
            )
            bound = RELEASED_WITHIN_S if prompt else 2 * LOST_WITHIN_S
            if now - ended_at > bound + SAMPLE_S:
                self.violated(f"{process.label} works for {request_id} {bound:g} s after its end")

    def _undisturbed_since(self, time: float) -> bool:
        return all(d.end is not None and d.end < time for d in self._injector.disturbances)

    def _hub_away(self, kind: Kind, since: float, until: float) -> bool:
        """Away, or back for no longer than workers may take to return to it or to let go."""
        return any(
            away.kind is kind and away.start <= until and (away.end is None or since <= away.end + HUB_SETTLES_WITHIN_S)
            for away in self._injector.hub_away
        )

    # When all is quiet.

    def check_answers(self) -> None:
        for request in self._requests:
            for problem in self._problems_of(request):
                self.violated(f"{request.name}: {problem}")

    def _problems_of(self, request: Request) -> Iterator[str]:
        answer, expected = request.answer, request.expected
        yield from answer.problems
        if answer.ended_at is None:
            yield "never ended"
            return
        if expected is not None and not expected.text.startswith(answer.text):
            yield f"its text is not what an undisturbed run says: {_difference(answer.text, expected.text)}"
        if answer.left:
            return
        if answer.error is None and answer.lost is None:
            yield from _problems_of_success(request)
        elif (reason := self._justification(request)) is None:
            yield f"failed without a reason: {answer.error or answer.lost} ({answer.message})"
        else:
            self.trace.note("checks", f"{request.name} may fail: {reason}")
        seconds = answer.ended_at - answer.started_at
        if seconds > MAX_REQUEST_S and not request.manners.pause_every:
            yield f"took {seconds:.1f} s"

    def _justification(self, request: Request) -> str | None:
        answer = request.answer
        assert answer.ended_at is not None
        since, until = answer.started_at - LOST_WITHIN_S, answer.ended_at
        if answer.error == "deadline":
            enough = request.timeout_s is not None and until - answer.started_at >= request.timeout_s - 0.01
            return "its deadline" if enough else None
        front = self._disturbed("Frontend", since, until, _FRONT_FAULTS)
        if front and (answer.lost is not None or answer.error == "draining"):
            return "its frontend was disturbed"
        if answer.lost is not None:
            return None
        hits = self._disturbed("VllmWorker", since, until)
        if any(since - SAMPLE_S <= at <= until + SAMPLE_S for at in self.no_worker_at):
            return "there was no decode worker"
        if hits > MIGRATION_LIMIT:
            return f"{hits} disturbances of decode workers"
        crash = frozenset({Kind.CRASH})
        crashes = sum(self._disturbed(service, since, until, crash) for service in ("VllmWorker", "PrefillWorker"))
        if answer.error in ("engine_crashed", "poison_request") and crashes > 1:
            return f"{crashes} engine crashes"
        if answer.error == "no_instance" and front and self._hub_away(Kind.HUB_RESTART, since, until):
            return "its frontend was new, and so was the hub: it knew of no worker yet"
        if answer.error == "overloaded" and hits:
            return "less capacity than load"
        return None

    def _disturbed(self, service: str, since: float, until: float, kinds: frozenset[Kind] | None = None) -> int:
        return sum(
            service in d.process.names
            and d.start <= until
            and (d.end is None or d.end >= since)
            and (kinds is None or d.kind in kinds)
            for d in self._injector.disturbances
        )

    def check_at_rest(self) -> None:
        """Every request has ended, every fault has healed, and the longest hold is over."""
        for process in self._cluster.processes:
            if not process.ready:
                self.violated(f"{process.label} is not back")
                continue
            for service in process.names:
                for left in _left_over(service, process.component(service)):
                    self.violated(f"{process.label}: {left} at rest")
            if "Frontend" in process.names:
                self._check_counters(process)
            self._check_fenced(process)
        self._check_queues()
        self._index.check_at_rest()
        self.violations += self._cluster.problems

    def _check_fenced(self, process: SimProcess) -> None:
        """Nobody begins anew, with a model to load, for what befell another."""
        disturbances = [d for d in self._injector.disturbances if d.process is process]
        for at in process.fenced_at:
            if not any(d.start <= at and (d.end is None or d.end >= at - LOST_WITHIN_S) for d in disturbances):
                self.violated(f"{process.label} fenced itself at {at:.3f} s, and nothing had disturbed it")

    def _check_queues(self) -> None:
        hub: Any = self._cluster.hub.hub
        for queue in [] if hub is None else hub._namespaces[NAMESPACE].queues.values():
            core = queue._core
            if core.size.waiting or core._in_flight:
                self.violated(f"{core.size.waiting} jobs wait and {len(core._in_flight)} are in flight at rest")

    def _check_counters(self, process: SimProcess) -> None:
        """One frontend that lived through the run has counted each request that reached it, once."""
        frontends = self._cluster.of_kind("Frontend")
        if process.num_lives > 1 or len(frontends) > 1:
            return
        metrics = process.component("Frontend").server._app._metrics
        counted = sum(_samples(metrics, "requests_total"))
        answered = sum(r.answer.complete for r in self._requests)
        sent = sum(r.answer.started_at > 0 for r in self._requests)
        if not answered <= counted <= sent:
            self.violated(f"the frontend counted {counted:g} requests; {sent} were sent, {answered} answered")


class _IndexCheck:
    """Routers' indexes against what workers hold, for the prompts of the workload."""

    def __init__(self, checks: Checks, cluster: Cluster, requests: Sequence[Request]) -> None:
        self._checks = checks
        self._cluster = cluster
        self._prompts = [
            list(block_hashes(pack(request.prompt_ids), BLOCK_SIZE, model=SERVED_NAME)) for request in requests[:8]
        ]
        self._held: dict[InstanceId, deque[tuple[float, tuple[int, ...]]]] = {}
        self._right_at: dict[tuple[str, InstanceId], float] = {}

    def sample(self, now: float) -> None:
        workers = {p.instance_id("VllmWorker"): p for p in self._cluster.of_kind("VllmWorker") if p.ready}
        for instance_id, process in workers.items():
            if instance_id is not None:
                self._record(instance_id, process, now)
        for router in self._cluster.of_kind("Router"):
            component = router.component("Router")
            if component is None or component.routes.index is None or router.node is None:
                continue
            if router.node.state is not NodeState.RUNNING:
                self._right_at.clear()
                continue
            self._compare(router, component.routes.index, [i for i in workers if i is not None], now)

    def _record(self, instance_id: InstanceId, process: SimProcess, now: float) -> None:
        component = process.component("VllmWorker")
        if component is None:
            return
        history = self._held.setdefault(instance_id, deque())
        history.append((now, self._depths(component.engine)))
        while len(history) > 1 and history[1][0] <= now - STALE_BOUND_S - INDEX_SLACK_S:
            history.popleft()

    def _depths(self, engine: Any) -> tuple[int, ...]:
        held = set(engine._blocks.cached_hashes())
        return tuple(next((i for i, h in enumerate(p) if h not in held), len(p)) for p in self._prompts)

    def _compare(self, router: SimProcess, index: Any, workers: list[InstanceId], now: float) -> None:
        claims = [index.overlaps(prompt) for prompt in self._prompts]
        for instance_id in workers:
            key = (router.label, instance_id)
            history = self._held.get(instance_id)
            wrong = (
                index.trusted(instance_id)
                and history
                and any(
                    claim.get(instance_id, 0) > max(depths[n] for _, depths in history)
                    for n, claim in enumerate(claims)
                )
            )
            if not wrong:
                self._right_at[key] = now
                continue
            if now - self._right_at.setdefault(key, now) > STALE_BOUND_S + INDEX_SLACK_S:
                self._checks.violated(f"{router.label} claims blocks that {instance_id} does not hold")
        self._checks.num_checked_claims += sum(map(len, claims))

    def check_at_rest(self) -> None:
        workers = {p.instance_id("VllmWorker"): p for p in self._cluster.of_kind("VllmWorker") if p.ready}
        for router in self._cluster.of_kind("Router"):
            component = router.component("Router")
            if component is None or component.routes.index is None:
                continue
            for number, prompt in enumerate(self._prompts):
                claims = component.routes.index.overlaps(prompt)
                for instance_id in claims:
                    if component.routes._directory.get(instance_id) is None:
                        self._checks.violated(f"{router.label} claims blocks of {instance_id}, which is gone")
                for instance_id, process in workers.items():
                    held = self._depths(process.component("VllmWorker").engine)[number]
                    said = claims.get(instance_id, 0)
                    if said != held:
                        self._checks.violated(f"{router.label} says {said} blocks where {process.label} holds {held}")


def _problems_of_success(request: Request) -> Iterator[str]:
    answer, expected = request.answer, request.expected
    if answer.status != 200 or answer.finish_reason is None:
        yield f"ended with status {answer.status} and finish reason {answer.finish_reason}"
        return
    if answer.usage is None:
        yield "no usage"
        return
    num_tokens_out = answer.usage["completion_tokens"]
    if expected is None:
        if not 1 <= num_tokens_out <= request.num_tokens_at_most:
            yield f"{num_tokens_out} tokens, at most {request.num_tokens_at_most} were asked for"
        return
    found = (answer.text, answer.finish_reason, answer.usage["prompt_tokens"], num_tokens_out)
    wanted = (expected.text, expected.finish_reason, expected.num_prompt_tokens, expected.num_output_tokens)
    if found != wanted:
        yield f"answered {found[1:]} instead of {wanted[1:]}; text: {_difference(answer.text, expected.text)}"


def _left_over(service: str, component: Any) -> Iterator[str]:
    """What a component holds of requests."""
    match service:
        case "Frontend":
            yield from _nonzero("open requests", component.server._app.generation.num_open)
        case "Processor":
            yield from _nonzero("open requests", component.processor.num_open)
        case "Router":
            yield from _nonzero("bookings", component.routes._core.num_bookings)
            yield from _nonzero("bookings of peers", component.routes._core.others.num_bookings)
        case "VllmWorker":
            yield from _nonzero("open requests", component.requests._num_open)
            yield from _nonzero("pending prefills", len(component.requests._pending))
            yield from _nonzero("jobs that it thinks wait", component.requests._outlook.num_waiting)
            yield from _engine_left_over(component.engine)
        case "PrefillWorker":
            yield from _nonzero("jobs in hand", len(component.jobs._in_hand))
            yield from _engine_left_over(component.engine)
        case _:
            raise AssertionError(service)


def _engine_left_over(engine: Any) -> Iterator[str]:
    load = engine.load()
    yield from _nonzero("running sequences", load.num_running)
    yield from _nonzero("waiting sequences", load.num_waiting)
    yield from _nonzero("blocks in use", load.num_blocks_used)
    yield from _nonzero("streams", len(engine._streams))


def _nonzero(what: str, number: float) -> Iterator[str]:
    if number:
        yield f"{number:g} {what}"


def _samples(metrics: Any, name: str) -> list[float]:
    """The values of a counter, over all its labels, as a scrape shows them."""
    lines = metrics.render().decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"stator_{name}{{", f"stator_{name} "))]


def _name_in(request_id: str) -> str:
    """The workload's name in an id that hops have added to: `[instance/]r12-0a1b2c3d/4[#2]`."""
    return next((part.split("-")[0] for part in request_id.split("/") if part.startswith("r") and "-" in part), "")


def _difference(found: str, wanted: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    sizes = f"{len(found)} characters, {len(wanted)} expected"
    return f"{sizes}, different from {at}: {found[at : at + 30]!r} {wanted[at : at + 30]!r}"


QUIET_S = TRANSFER_HOLD_S + SETTLE_S
"""After the last request's end nothing of any is left."""
