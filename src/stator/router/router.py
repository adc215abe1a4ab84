"""The Router: answers `route` with a decode instance and keeps the booking as long as the call is open. A call for
which there is no room is not answered until there is; those wait in `router.waiting`.

The decision is `core.routing`'s. This shell feeds it: instances from the directory, the blocks they hold from the
index, their load from their reports, and what became of its decisions from the Processors (`observe`).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random

from stator.config.schema import ProcessorConfig, RouterConfig
from stator.core.admission import FIRST, Line, QueueLimits, Wait
from stator.core.candidates import Candidate
from stator.core.cost import overlap_difference
from stator.core.overlap_check import outcome_of
from stator.core.peer_bookings import BookingLog
from stator.core.routing import Choice, NoRoom, RouterMode, RoutingCore
from stator.core.worker_load import seqs_let_in
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo, EngineLoad
from stator.messages.instances import InstanceInfo
from stator.messages.processor import RouteDecision, RouteRequest
from stator.messages.reports import IndexStats, WorkerReport
from stator.messages.routing import DecisionsRequest, RouteObservation, RouteObservations
from stator.observability.monitor import WorkerMonitor
from stator.router.counters import RouterCounters
from stator.router.decisions import DecisionLog
from stator.router.index import KvIndex
from stator.router.peers import PeerExchange
from stator.router.step_time import SpeedFactor, StepTimes, shipped_step_times
from stator.router.waiting import WaitingCalls
from stator.runtime.context import Clocks
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.runtime.settings import FollowSetting
from stator.transport.base import Call, TransportClient

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
MAX_RECORDS = 1000
STALE_CHECK_MS = 50.0
SLOWNESS_CHANGE = 0.1
TELL_SLOWNESS = 3.0
_Wanted = tuple[str, str | None]
"""A model, and the adapter of it that a request is for."""

_UNKNOWN_ENGINE = EngineInfo("", "", "", 64, 0, 1, 0, 0)


def queue_limits(config: RouterConfig | ProcessorConfig) -> QueueLimits:
    return QueueLimits(config.max_queued_requests, config.max_queued_tokens, config.max_queue_wait * 1e3)


def router_mode(name: str) -> RouterMode:
    return RouterMode(name)


class Router:
    """min_workers: decode instances that must have been there once before anything is routed, so that the first
    worker up does not take a whole start-up's load. limits: of the requests that wait for room. Workers' reports are
    followed in all modes, for the room they have; their blocks in mode kv only. instance_id: of this router, if other
    routers may ask it for its bookings (`bookings`), and it them."""

    def __init__(
        self,
        *,
        client: TransportClient,
        directory: InstanceDirectory,
        mode: RouterMode,
        min_workers: int,
        rng: Random,
        limits: QueueLimits | None = None,
        step_times: StepTimes | None = None,
        clocks: Clocks = time,
        instance_id: InstanceId | None = None,
    ) -> None:
        own = None if instance_id is None else BookingLog()
        self._core = RoutingCore(mode, rng, own)
        self._client = client
        self._rng = rng
        self._now = asyncio.get_running_loop().time
        self._directory = directory
        self._min_workers = min_workers
        self._step_times = step_times or shipped_step_times()
        self._clocks = clocks
        self._log = DecisionLog()
        self._counters = RouterCounters()
        self._factors: dict[tuple[str, str, str], SpeedFactor] = {}
        self._enough_workers: set[str] = set()
        self._by_model: dict[_Wanted, tuple[list[Candidate], dict[InstanceId, InstanceInfo]]] = {}
        self._most_tokens: dict[_Wanted, int] = {}
        self._stale: dict[_Wanted, tuple[float, frozenset[InstanceId]]] = {}
        self._slowness: dict[InstanceId, float] = {}
        self._waiting = WaitingCalls(
            limits or QueueLimits(),
            rng,
            place=self._place,
            num_instances=lambda model: len(self._candidates(model)[0]),
            no_instance=lambda model: self._no_instance(model, 0),
            refused=self._counters.refused,
        )
        self._unsubscribe = directory.subscribe(self._changed)
        self.peers: PeerExchange | None = None
        if own is not None and instance_id is not None:
            self.peers = PeerExchange(
                client=client,
                directory=directory,
                own_id=instance_id,
                log=own,
                into=self._core.others,
                rng=rng,
                on_room=self._waiting.look_soon,
            )
        self.index: KvIndex | None = None
        self._follow_blocks()
        self._monitor = WorkerMonitor(
            client=client, directory=directory, sink=_LoadSink(self), rng=rng, roles=("decode",)
        )

    def follow_settings(self, follow: FollowSetting, option: str) -> None:
        """Change the mode with the deployment's setting. option: of the service's section, which has the mode."""
        follow("router-mode", option, lambda value: self.set_mode(RouterMode(value)))

    def set_mode(self, mode: RouterMode) -> None:
        """From the next decision on. Bookings, reports and what was learned of workers stay; in mode kv the index is
        built anew from the workers' snapshots, within about a second."""
        self._core.set_mode(mode)
        self._follow_blocks()
        self._waiting.look_soon()

    def _follow_blocks(self) -> None:
        wanted = self._core.mode is RouterMode.KV
        if self.index is not None and not wanted:
            self.index.close()
            self.index = None
        elif self.index is None and wanted:
            self.index = KvIndex(client=self._client, directory=self._directory, rng=self._rng)
        self._stale.clear()

    def route(self, call: Call) -> None:
        """Endpoint `route`: RouteRequest in, one RouteDecision out, as soon as there is room for the request; the call
        then stays open as the booking."""
        started = self._clocks.perf_counter()
        request: RouteRequest = call.request
        if request.begun:
            # A router before this one served already, whose start-up is over.
            self._enough_workers.add(request.model)
        if request.booked_on is not None:
            self._book_again(call, request, request.booked_on)
            return
        wanted = (request.model, request.lora_name)
        candidates, _ = self._candidates(*wanted)
        num_instances = len(candidates) if request.lora_name is None else len(self._candidates(request.model)[0])
        if not self._ready(request.model, num_instances):
            call.end(self._no_instance(request.model, num_instances))
            return
        most = self._most_tokens[wanted]
        if most and request.num_prompt_tokens + request.max_tokens - 1 > most:
            call.end(_too_large(request, most))
        elif not candidates:
            call.end(self._no_instance(request.model, 0, request.lora_name))
        elif self._waiting.waits(request.model):
            # Those that wait are first, and the line says who may overtake.
            self._waiting.join(call, request, self._core.need(request, candidates, self._now() * 1e3))
        else:
            choice = self._choose(request, candidates, FIRST)
            if isinstance(choice, NoRoom):
                self._waiting.join(call, request, choice.need)
            else:
                self._answer(call, request, choice, started, 0.0)

    def _place(self, call: Call, request: RouteRequest, waited_s: float, line: Line) -> Wait | None:
        """Answer a call that waits, or say what it waits for."""
        started = self._clocks.perf_counter()
        candidates = self._candidates(request.model, request.lora_name)[0]
        if not candidates:
            call.end(self._no_instance(request.model, 0, request.lora_name))
            return None
        choice = self._choose(request, candidates, line)
        if isinstance(choice, NoRoom):
            return Wait(choice.waits_for, choice.by_choice)
        self._answer(call, request, choice, started, waited_s)
        return None

    def _answer(self, call: Call, request: RouteRequest, choice: Choice, started: float, waited_s: float) -> None:
        call.on_cancel(lambda: self._release(choice.booking))
        if call.cancelled:
            return
        info = self._candidates(request.model)[1][choice.winner]
        decision = RouteDecision(choice.winner, info.addresses, choice.overlap.blocks, choice.cost_ms, choice.booking)
        call.items([decision])
        block_size = (info.engine or _UNKNOWN_ENGINE).block_size
        self._log.add(call.context.request_id, self._clocks.time(), request, choice, block_size, self._basis(choice))
        self._counters.decided(choice.mode.value, self._clocks.perf_counter() - started, waited_s)

    def _book_again(self, call: Call, request: RouteRequest, instance_id: InstanceId) -> None:
        """The request runs there whatever we know of the instance; it must count, and wait for nothing."""
        known = (c for c in self._candidates(request.model)[0] if c.instance_id == instance_id)
        booking = self._core.book_existing(request, next(known, Candidate(instance_id)), self._now() * 1e3)
        call.on_cancel(lambda: self._release(booking))
        if not call.cancelled:
            call.items([RouteDecision(instance_id, (), booking=booking)])

    def _release(self, booking: int) -> None:
        self._core.release(booking, self._now() * 1e3)
        self._waiting.look_soon()

    def observe(self, call: Call) -> None:
        """Endpoint `observe`: RouteObservations in, nothing out."""
        request: RouteObservations = call.request
        now = self._now() * 1e3
        for observation in request.observations:
            self._observe(observation, now)
        self._waiting.look_soon()
        call.end()

    def bookings(self, call: Call) -> None:
        """Endpoint `bookings`: BookingsRequest in, BookingChanges out, for the other routers."""
        if self.peers is None:
            call.end(StatorError(ErrorCode.NOT_FOUND, "this router keeps its bookings to itself"))
        else:
            self.peers.bookings(call)

    def decisions(self, call: Call) -> None:
        """Endpoint `decisions`: DecisionsRequest in, DecisionRecords out, the newest first."""
        request: DecisionsRequest = call.request
        call.items(list(self._log.records(request.request_id, min(max(0, request.limit), MAX_RECORDS))))
        call.end()

    def report(self) -> WorkerReport:
        """The router's figures, in the form that every instance reports in."""
        stats = self._counters.stats(
            num_bookings=self._core.num_bookings,
            num_waiting=self._waiting.num_waiting,
            num_waiting_tokens=self._waiting.num_waiting_tokens,
            index=self._index_stats(),
            peers=None if self.peers is None else self.peers.stats(),
        )
        return WorkerReport(EngineLoad(), router=stats)

    def ready(self, model: str) -> bool:
        """Whether `route` would find an instance for the model now."""
        candidates, _ = self._candidates(model)
        return bool(candidates) and self._ready(model, len(candidates))

    def close(self) -> None:
        self._unsubscribe()
        self._waiting.close()
        self._monitor.close()
        if self.peers is not None:
            self.peers.close()
        if self.index is not None:
            self.index.close()

    # Decisions

    def _choose(self, request: RouteRequest, candidates: list[Candidate], line: Line) -> Choice | NoRoom:
        """candidates: at least one."""
        now, index, peers = self._now() * 1e3, self.index, self.peers
        if peers is not None:
            self._core.peer_lag_ms = peers.lag_ms()
        if index is None:
            choice = self._core.admit(request, candidates, now, line=line)
        else:
            held = index.overlaps(request.block_hashes)
            wanted = (request.model, request.lora_name)
            looked_at, stale = self._stale.get(wanted, (now - STALE_CHECK_MS, frozenset[InstanceId]()))
            if now - looked_at >= STALE_CHECK_MS:
                stale = frozenset(c.instance_id for c in candidates if not index.trusted(c.instance_id))
                self._stale[wanted] = (now, stale)
            choice = self._core.admit(request, candidates, now, held=held, stale=stale, line=line)
        assert choice is not None
        return choice

    def _basis(self, choice: Choice) -> str:
        """What the predicted overlap rests on; a wrong prediction counts against the events only if it is "events"."""
        if self.index is None:
            return ""
        if not self.index.trusted(choice.winner):
            return "unsettled"
        return "booked" if choice.overlap.booked > choice.overlap.blocks else "events"

    def _observe(self, observation: RouteObservation, now: float) -> None:
        booking = observation.booking
        decided = self._log.by_booking(booking)
        if observation.failed:
            self._core.failed(booking, now)
        elif observation.num_cached_tokens is not None:
            computed_here = None if observation.fetched else observation.num_cached_tokens
            self._core.first_token(booking, now, computed_here)
        if decided is None:
            return
        decided.failed = decided.failed or observation.failed
        if observation.num_cached_tokens is not None:
            decided.cached_tokens = observation.num_cached_tokens
            if decided.basis and not observation.fetched:
                difference = overlap_difference(
                    decided.choice.overlap.blocks,
                    observation.num_cached_tokens,
                    observation.num_total_tokens,
                    decided.block_size,
                )
                decided.overlap_difference = difference
                self._compare(decided.choice, decided.basis, difference, now)
        if observation.num_output_tokens is not None:
            decided.output_tokens = observation.num_output_tokens
            self._core.finished(decided.model, observation.num_output_tokens)

    def _compare(self, choice: Choice, basis: str, difference: int, now: float) -> None:
        self._counters.predicted(outcome_of(difference).value, basis, difference)
        if basis != "events":
            return
        mismatch = self._core.check.observe(choice.winner, choice.overlap.blocks, difference, now)
        if mismatch is not None:
            logger.warning(
                "worker %s had fewer cached blocks than predicted in %d of its last %d requests; its overlap counts "
                "%.0f %% until that ends. Causes: too few KV blocks (evicted before use), another block size, lost "
                "events",
                mismatch.instance_id,
                mismatch.num_over,
                mismatch.of,
                mismatch.trust * 100,
            )

    # Candidates

    def _candidates(
        self, model: str, lora_name: str | None = None
    ) -> tuple[list[Candidate], dict[InstanceId, InstanceInfo]]:
        wanted = (model, lora_name)
        known = self._by_model.get(wanted)
        if known is None:
            infos = {i.instance_id: i for i in self._directory.instances(role="decode", model=model, adapter=lora_name)}
            known = self._by_model[wanted] = ([self._candidate(info) for info in infos.values()], infos)
            sizes = [candidate.num_kv_tokens for candidate in known[0]]
            self._most_tokens[wanted] = max(sizes) if sizes and all(sizes) else 0
        return known

    def _candidate(self, info: InstanceInfo) -> Candidate:
        engine = info.engine or _UNKNOWN_ENGINE
        step_time = self._step_times.of(engine) or self._factor(engine).step_time
        slowness = self._slowness.get(info.instance_id, 1.0)
        return Candidate(
            info.instance_id,
            engine.max_num_seqs,
            engine.block_size,
            step_time if slowness == 1.0 else step_time.scaled(slowness),
            max_seqs=0 if info.engine is None else seqs_let_in(engine.max_num_seqs),
            num_kv_tokens=engine.num_blocks * engine.block_size,
            slowness=slowness,
        )

    def _factor(self, engine: EngineInfo) -> SpeedFactor:
        kind = (engine.engine, engine.model_id or engine.model, engine.device)
        factor = self._factors.get(kind)
        if factor is None:
            factor = self._factors[kind] = SpeedFactor(self._step_times.fallback)
            logger.info(
                "no step times are known for %s on %s with engine %s; taking them from the workers' reports",
                kind[1] or "an unnamed model",
                kind[2] or "an unnamed device",
                kind[0] or "unknown",
            )
        return factor

    def _ready(self, model: str, num_instances: int) -> bool:
        if num_instances >= self._min_workers:
            self._enough_workers.add(model)
        return model in self._enough_workers

    def _no_instance(self, model: str, num_instances: int, lora_name: str | None = None) -> StatorError:
        if lora_name is not None:
            message = f"no worker of {model} that has the adapter {lora_name!r} is ready"
        elif num_instances:
            message = f"waiting for {self._min_workers} workers of {model}; {num_instances} are ready"
        else:
            message = f"no worker of {model} is ready; one may be starting"
        return StatorError(ErrorCode.NO_INSTANCE, message, retry_after_s=RETRY_AFTER_S)

    # What comes in

    def _changed(self, change: DirectoryChange) -> None:
        self._by_model.clear()
        self._stale.clear()
        for instance in change.removed:
            self._core.drop_worker(instance.instance_id)
            self._waiting.forget_instance(instance.instance_id)
            self._slowness.pop(instance.instance_id, None)
            for factor in self._factors.values():
                factor.forget(instance.instance_id)
        self._waiting.look_soon()

    def take_report(self, instance: InstanceInfo, report: WorkerReport) -> None:
        now = self._now() * 1e3
        engine = instance.engine or _UNKNOWN_ENGINE
        load = self._core.load(instance.instance_id)
        load.report(report.load, report.prefills, now, block_size=0 if instance.engine is None else engine.block_size)
        if self._step_times.of(engine) is None and self._factor(engine).report(instance.instance_id, report.load, now):
            self._by_model.clear()
        self._follow_speed(instance.instance_id, now)
        self._waiting.look_soon()

    def _follow_speed(self, instance_id: InstanceId, now: float) -> None:
        slowness, applied = self._core.speeds.slowness(instance_id, now), self._slowness.get(instance_id, 1.0)
        if slowness == applied or (slowness != 1.0 and abs(slowness / applied - 1) < SLOWNESS_CHANGE):
            return
        if max(slowness, 1.0) >= TELL_SLOWNESS > max(applied, 1.0):
            logger.warning(
                "worker %s takes about %.1f times as long as others to its first tokens; it gets fewer requests until "
                "that ends. Look for a throttled or shared GPU there, or a slow network",
                instance_id,
                slowness,
            )
        self._slowness[instance_id] = slowness
        self._by_model.clear()

    def _index_stats(self) -> IndexStats | None:
        if self.index is None:
            return None
        stats = self.index.stats()
        return IndexStats(
            num_entries=stats.num_entries,
            num_bytes=stats.memory_bytes,
            num_workers=stats.num_instances,
            num_settled=stats.num_trusted,
            gaps_total=stats.num_gaps + stats.num_mismatches,
        )


class _LoadSink:
    """Workers' reports on their way into the core. A worker that left is dropped by the directory's own change."""

    def __init__(self, router: Router) -> None:
        self._router: Callable[[InstanceInfo, WorkerReport], None] = router.take_report

    def update(self, instance: InstanceInfo, report: WorkerReport) -> None:
        self._router(instance, report)

    def remove(self, instance_id: InstanceId) -> None:
        pass


def _too_large(request: RouteRequest, most: int) -> StatorError:
    num_tokens = request.num_prompt_tokens + request.max_tokens
    return StatorError(
        ErrorCode.INVALID_REQUEST,
        f"the prompt has {request.num_prompt_tokens} tokens and max_tokens is {request.max_tokens}, together "
        f"{num_tokens}; the largest worker of {request.model} holds {most}. Shorten the prompt or lower max_tokens",
        param="max_tokens",
    )
