"""The Router: answers `route` with a decode instance and keeps the booking as long as the call is open.

The decision is `core.routing`'s. This shell feeds it: instances from the directory, the blocks they hold from the
index, their load from their reports, and what became of its decisions from the Processors (`observe`).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from typing import Protocol

from stator.core.cost import overlap_difference
from stator.core.overlap_check import outcome_of
from stator.core.routing import Candidate, Choice, RouterMode, RoutingCore
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
from stator.router.step_time import SpeedFactor, StepTimes, shipped_step_times
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.transport.base import Call, TransportClient

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0
MAX_RECORDS = 1000
STALE_CHECK_MS = 50.0
_UNKNOWN_ENGINE = EngineInfo("", "", "", 64, 0, 1, 0, 0)


class Clocks(Protocol):
    """Unix seconds for people, and seconds of a fine clock for how long a decision takes."""

    def time(self) -> float: ...

    def perf_counter(self) -> float: ...


def router_mode(name: str) -> RouterMode:
    return RouterMode(name)


class Router:
    """min_workers: decode instances that must have been there once before anything is routed, so that the first
    worker up does not take a whole start-up's load. Follows workers' blocks and reports in mode kv only."""

    def __init__(
        self,
        *,
        client: TransportClient,
        directory: InstanceDirectory,
        mode: RouterMode,
        min_workers: int,
        rng: Random,
        step_times: StepTimes | None = None,
        clocks: Clocks = time,
    ) -> None:
        self._core = RoutingCore(mode, rng)
        self._now = asyncio.get_running_loop().time
        self._directory = directory
        self._min_workers = min_workers
        self._step_times = step_times or shipped_step_times()
        self._clocks = clocks
        self._log = DecisionLog()
        self._counters = RouterCounters()
        self._factors: dict[tuple[str, str, str], SpeedFactor] = {}
        self._enough_workers: set[str] = set()
        self._by_model: dict[str, tuple[list[Candidate], dict[InstanceId, InstanceInfo]]] = {}
        self._stale: dict[str, tuple[float, frozenset[InstanceId]]] = {}
        self._unsubscribe = directory.subscribe(self._changed)
        self.index: KvIndex | None = None
        self._monitor: WorkerMonitor | None = None
        if mode is RouterMode.KV:
            self.index = KvIndex(client=client, directory=directory, rng=rng)
            self._monitor = WorkerMonitor(
                client=client, directory=directory, sink=_LoadSink(self), rng=rng, roles=("decode",)
            )

    def route(self, call: Call) -> None:
        """Endpoint `route`: RouteRequest in, one RouteDecision out; the call then stays open as the booking."""
        started = self._clocks.perf_counter()
        request: RouteRequest = call.request
        candidates, infos = self._candidates(request.model)
        if not self._ready(request.model, len(candidates)):
            call.end(self._no_instance(request.model, len(candidates)))
            return
        choice = self._choose(request, candidates)
        if choice is None:
            call.end(self._no_instance(request.model, 0))
            return
        call.on_cancel(lambda: self._core.release(choice.booking, self._now() * 1e3))
        if call.cancelled:
            return
        info = infos[choice.winner]
        decision = RouteDecision(choice.winner, info.addresses, choice.overlap.blocks, choice.cost_ms, choice.booking)
        call.items([decision])
        block_size = (info.engine or _UNKNOWN_ENGINE).block_size
        self._log.add(call.context.request_id, self._clocks.time(), request, choice, block_size, self._basis(choice))
        self._counters.decided(choice.mode.value, self._clocks.perf_counter() - started)

    def observe(self, call: Call) -> None:
        """Endpoint `observe`: RouteObservations in, nothing out."""
        request: RouteObservations = call.request
        now = self._now() * 1e3
        for observation in request.observations:
            self._observe(observation, now)
        call.end()

    def decisions(self, call: Call) -> None:
        """Endpoint `decisions`: DecisionsRequest in, DecisionRecords out, the newest first."""
        request: DecisionsRequest = call.request
        call.items(list(self._log.records(request.request_id, min(max(0, request.limit), MAX_RECORDS))))
        call.end()

    def report(self) -> WorkerReport:
        """The router's figures, in the form that every instance reports in."""
        stats = self._counters.stats(num_bookings=self._core.num_bookings, index=self._index_stats())
        return WorkerReport(EngineLoad(), router=stats)

    def ready(self, model: str) -> bool:
        """Whether `route` would find an instance for the model now."""
        candidates, _ = self._candidates(model)
        return bool(candidates) and self._ready(model, len(candidates))

    def close(self) -> None:
        self._unsubscribe()
        if self._monitor is not None:
            self._monitor.close()
        if self.index is not None:
            self.index.close()

    # Decisions

    def _choose(self, request: RouteRequest, candidates: list[Candidate]) -> Choice | None:
        now, index = self._now() * 1e3, self.index
        if index is None:
            return self._core.choose(request, candidates, now)
        held = index.overlaps(request.block_hashes)
        looked_at, stale = self._stale.get(request.model, (now - STALE_CHECK_MS, frozenset[InstanceId]()))
        if now - looked_at >= STALE_CHECK_MS:
            stale = frozenset(c.instance_id for c in candidates if not index.trusted(c.instance_id))
            self._stale[request.model] = (now, stale)
        return self._core.choose(request, candidates, now, held=held, stale=stale)

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
            self._core.failed(booking)
        elif observation.num_cached_tokens is not None:
            self._core.first_token(booking, now)
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

    def _candidates(self, model: str) -> tuple[list[Candidate], dict[InstanceId, InstanceInfo]]:
        known = self._by_model.get(model)
        if known is None:
            infos = {i.instance_id: i for i in self._directory.instances(role="decode", model=model)}
            known = self._by_model[model] = ([self._candidate(info) for info in infos.values()], infos)
        return known

    def _candidate(self, info: InstanceInfo) -> Candidate:
        engine = info.engine or _UNKNOWN_ENGINE
        step_time = self._step_times.of(engine) or self._factor(engine).step_time
        return Candidate(info.instance_id, engine.max_num_seqs, engine.block_size, step_time)

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

    def _no_instance(self, model: str, num_instances: int) -> StatorError:
        if num_instances:
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
            for factor in self._factors.values():
                factor.forget(instance.instance_id)

    def take_report(self, instance: InstanceInfo, report: WorkerReport) -> None:
        now = self._now() * 1e3
        self._core.load(instance.instance_id).report(report.load, report.prefills, now)
        engine = instance.engine or _UNKNOWN_ENGINE
        if self._step_times.of(engine) is None and self._factor(engine).report(instance.instance_id, report.load, now):
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
