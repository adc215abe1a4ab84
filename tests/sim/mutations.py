"""Ways to break the product, one at a time, that the simulated deployment must notice."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from stator.core.queue_outlook import QueueOutlook
from stator.core.remote_prefill import Completed, RemotePrefill, Reply, StartFetched, State
from stator.core.routing import RoutingCore
from stator.messages.tokens import TokenBuffer
from stator.processor import generation
from stator.processor.instances import DecodeInstances
from stator.runtime.clock import RunningClock
from stator.runtime.context import loop_time
from stator.testing.sim.cluster import Layout
from stator.testing.sim.faults import Kind
from stator.testing.sim.run import Settings
from stator.worker.decode import DecodeWorker
from stator.worker.prefill import PrefillWorker

Break = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutation:
    """settings: under which it must be caught. says: a part of a violation that it must cause. first: seed to try;
    near one that catches it, which keeps the test short."""

    make: Break
    says: str
    settings: Settings = field(default_factory=Settings)
    first: int = 1


def no_ack(patch: pytest.MonkeyPatch) -> None:
    async def forget(*_: Any) -> None:
        return

    patch.setattr(PrefillWorker, "_ack", forget)


def no_lease_check(patch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> bool:
        return False

    def always(*_: Any) -> bool:
        return True

    patch.setattr(DecodeInstances, "is_gone", never)
    patch.setattr(DecodeInstances, "is_known", always)


def no_release(patch: pytest.MonkeyPatch) -> None:
    def keep(*_: Any) -> None:
        return

    patch.setattr(RoutingCore, "release", keep)


def no_dedupe(patch: pytest.MonkeyPatch) -> None:
    """A job's second completion is taken as its first was."""
    worker: Any = DecodeWorker
    prefill_remotely, prefill_done = worker._prefill_remotely, worker.prefill_done
    handle = RemotePrefill.handle
    jobs: dict[Any, Any] = {}

    def remember(self: Any, request: Any, call: Any) -> None:
        prefill_remotely(self, request, call)
        jobs.update(self._pending)

    def done(self: Any, call: Any) -> None:
        if call.request.job_id in jobs:
            self._pending.setdefault(call.request.job_id, jobs[call.request.job_id])
        prefill_done(self, call)

    def again(self: RemotePrefill, event: Any) -> Any:
        if isinstance(event, Completed) and self.state is not State.PENDING and event.result is not None:
            return [Reply(accepted=True), StartFetched(event.result)]
        return handle(self, event)

    patch.setattr(DecodeWorker, "_prefill_remotely", remember)
    patch.setattr(DecodeWorker, "prefill_done", done)
    patch.setattr(RemotePrefill, "handle", again)


def wrong_offset(patch: pytest.MonkeyPatch) -> None:
    pack = generation.pack

    def short(ids: Sequence[int]) -> TokenBuffer:
        return pack(list(ids)[:-1])

    patch.setattr(generation, "pack", short)


def no_clock_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """The hub's leases end by a clock that goes on while the hub does not."""
    patch.setattr(RunningClock, "now", lambda _: loop_time())
    patch.setattr(RunningClock, "on_loop", lambda _, time: time)


def no_end_of_waiting(patch: pytest.MonkeyPatch) -> None:
    """Only news of the queue's size say that an own job waits no more."""

    def keep(*_: Any) -> None:
        return

    patch.setattr(QueueOutlook, "waits_no_more", keep)


_SCATTERED = Layout(num_frontends=2, num_decode=2, num_prefill=0, router_apart=True)
_REMOTE = Layout(num_decode=1, num_prefill=2, remote_from_tokens=16)

MUTATIONS: Mapping[str, Mutation] = {
    "the ack": Mutation(no_ack, "in flight at rest", Settings(kinds=(), layout=_REMOTE)),
    "the lease check": Mutation(
        no_lease_check,
        "has no lease",
        Settings(
            kinds=(Kind.CUT, Kind.KILL),
            max_faults=8,
            num_requests=30,
            over_s=20.0,
            layout=_SCATTERED,
            router_faults=True,
        ),
        first=22,
    ),
    "the booking's release": Mutation(no_release, "bookings at rest", Settings(kinds=())),
    "the dedupe of completions": Mutation(
        no_dedupe, "open requests at rest", Settings(kinds=(Kind.PAUSE,), max_faults=6, layout=_REMOTE), first=38
    ),
    "the hub's own clock": Mutation(
        no_clock_of_its_own, "nothing had disturbed it", Settings(kinds=(Kind.HUB_PAUSE,), layout=_REMOTE)
    ),
    "the end of waiting": Mutation(
        no_end_of_waiting,
        "jobs that it thinks wait at rest",
        Settings(kinds=(Kind.HUB_PAUSE,), max_faults=8, num_requests=30, layout=_REMOTE),
    ),
    "the resume offset": Mutation(wrong_offset, "its text is not", Settings(kinds=(Kind.KILL,), max_faults=6)),
}
