"""The Router: answers `route` with a decode instance and keeps the booking as long as the call is open."""

import logging
from random import Random

from stator.core.routing import Candidate, RouterMode, RoutingCore
from stator.errors import ErrorCode, StatorError
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo
from stator.messages.processor import RouteDecision, RouteRequest
from stator.runtime.directory import DirectoryChange, InstanceDirectory
from stator.transport.base import Call

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 2.0


def router_mode(name: str) -> RouterMode:
    """`kv` is accepted and balances load, until routing by KV cache is there; that is said once."""
    if name != "kv":
        return RouterMode(name)
    logger.info("router mode kv is not available yet; using least-loaded")
    return RouterMode.LEAST_LOADED


class Router:
    """min_workers: decode instances that must have been there once before anything is routed, so that the first
    worker up does not take a whole start-up's load."""

    def __init__(self, *, directory: InstanceDirectory, mode: RouterMode, min_workers: int, rng: Random) -> None:
        self._core = RoutingCore(mode, rng)
        self._directory = directory
        self._min_workers = min_workers
        self._enough_workers: set[str] = set()
        self._by_model: dict[str, tuple[list[Candidate], dict[InstanceId, InstanceInfo]]] = {}
        self._unsubscribe = directory.subscribe(self._on_change)

    def route(self, call: Call) -> None:
        """Endpoint `route`: RouteRequest in, one RouteDecision out; the call then stays open as the booking."""
        request: RouteRequest = call.request
        candidates, infos = self._candidates(request.model)
        if not self._ready(request.model, len(candidates)):
            call.end(self._no_instance(request.model, len(candidates)))
            return
        choice = self._core.choose(request, candidates)
        if choice is None:
            call.end(self._no_instance(request.model, 0))
            return
        call.on_cancel(lambda: self._core.release(choice.winner, request))
        if not call.cancelled:
            call.items([RouteDecision(choice.winner, infos[choice.winner].addresses)])

    def ready(self, model: str) -> bool:
        """Whether `route` would find an instance for the model now."""
        candidates, _ = self._candidates(model)
        return bool(candidates) and self._ready(model, len(candidates))

    def _on_change(self, _change: DirectoryChange) -> None:
        self._by_model.clear()

    def close(self) -> None:
        self._unsubscribe()

    def _candidates(self, model: str) -> tuple[list[Candidate], dict[InstanceId, InstanceInfo]]:
        known = self._by_model.get(model)
        if known is None:
            infos = {i.instance_id: i for i in self._directory.instances(role="decode", model=model)}
            seqs = {i: info.engine.max_num_seqs if info.engine else 1 for i, info in infos.items()}
            known = self._by_model[model] = ([Candidate(i, seqs[i]) for i in infos], infos)
        return known

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
