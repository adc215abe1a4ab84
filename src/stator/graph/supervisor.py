"""One node: the hub if this is the head, and the processes of its services, kept running until told to stop.

Life of a process: started, ready, ended; started again after a while unless the end was asked for, or its
configuration is wrong, or it keeps failing, which stops the node. One that was drained on request is not started again,
or at once if that was asked for; if it may run beside its successor, that is started first, and the old one drains when
the new one is ready. Stop: processes are asked to drain, consumers before those they call; what is left when the grace
is over is killed; the hub goes last. A second signal kills all at once.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from stator.errors import ConfigError
from stator.graph.children import Child, describe_exit, start_child
from stator.graph.placement import ProcessPlan
from stator.graph.protocol import (
    SUCCESSOR_TIMEOUT_S,
    ChildSpec,
    ExitCode,
    Hung,
    Leaving,
    Ready,
    Report,
    Serving,
)
from stator.graph.restart import RestartLimits, RestartPolicy
from stator.graph.terminal import Terminal
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

KILL_HUNG_S = 10.0
"""After a process said that its engine hangs; by then it has ended by itself, if it can."""


@dataclass(frozen=True, slots=True)
class Settings:
    """grace_s: for all processes together to drain and stop."""

    grace_s: float = 30.0
    restart: RestartLimits = field(default_factory=RestartLimits)


class _Keeper:
    """Keeps one planned process running. `child` is the one that counts; while it is new, those before it may still
    drain, in `old`."""

    def __init__(self, node: "Supervisor", plan: ProcessPlan, spec: ChildSpec) -> None:
        self.plan = plan
        self.ready = False
        self.child: Child | None = None
        self.old: set[Child] = set()
        self.done = asyncio.Event()
        self.listen_fd = spec.listen_fd
        self._node = node
        self._spec = spec
        self._policy = RestartPolicy(node.settings.restart)
        self._first_failure: str | None = None
        self._successor: Child | None = None
        self._tasks = TaskOwner(plan.label)

    async def run(self) -> None:
        try:
            while not self._node.stopping.is_set():
                self.child, self._successor = self._successor or await self._start(), None
                # A stop that came while it was started did not see it.
                if self._node.killing.is_set():
                    self.child.kill()
                elif self._node.stopping.is_set():
                    self.child.terminate()
                code = await self._ended_or_succeeded(self.child)
                if code is None:
                    continue
                self.ready = False
                self._node.child_ended(self.child)
                if self._node.stopping.is_set() or not await self._answer(self.child, code):
                    break
            await asyncio.gather(*(child.wait() for child in list(self.old)))
        except ConfigError as error:
            self._node.give_up(self.plan.label, str(error), ExitCode.CONFIG)
        except Exception as error:
            logger.exception("keeping %s running failed", self.plan.label)
            self._node.give_up(self.plan.label, f"{self.plan.label}: {error}", ExitCode.FAILURE)
        finally:
            await self._tasks.close()
            if (successor := self._successor) is not None:
                successor.kill()
                await successor.wait()
            self.done.set()
            self._node.keeper_done()

    def terminate(self) -> None:
        for child in self._all():
            child.terminate()

    def kill(self) -> None:
        for child in self._all():
            child.kill()

    def _all(self) -> list[Child]:
        return [child for child in (self.child, self._successor, *self.old) if child is not None]

    async def _ended_or_succeeded(self, child: Child) -> int | None:
        """The exit code; None once a successor has taken the child's place, which then drains by itself."""
        ended = self._tasks.spawn(child.wait(), "wait")
        succeeded = self._tasks.spawn(child.succeeded.wait(), "wait for a successor")
        await asyncio.wait([ended, succeeded], return_when=asyncio.FIRST_COMPLETED)
        succeeded.cancel()
        if ended.done():
            return ended.result()
        self.old.add(child)
        ended.add_done_callback(lambda _: self._old_ended(child))
        return None

    def _old_ended(self, child: Child) -> None:
        self.old.discard(child)
        self._node.child_ended(child)

    async def _bring_successor(self, leaving: Child) -> None:
        """Start what takes the place of a child that asked for it, and let that one drain when it is ready."""
        label, terminal = self.plan.label, self._node.terminal
        terminal.say(f"stator: {label} is to drain and start again; starting its successor first")
        try:
            successor = self._successor = await self._start()
        except ConfigError as error:
            terminal.complain(f"stator: {label} goes on, for its successor cannot be started: {error}")
            return
        ready = await successor.ready_within(SUCCESSOR_TIMEOUT_S)
        if ready and leaving is self.child and not self._node.stopping.is_set():
            leaving.succeeded.set()
            leaving.terminate()
            return
        self._successor = None
        if not self._node.stopping.is_set():
            terminal.complain(f"stator: the successor of {label} did not become ready; {label} goes on")
        successor.kill()
        await successor.wait()

    async def _start(self) -> Child:
        label, terminal = self.plan.label, self._node.terminal
        return await start_child(
            self._spec,
            self.plan.args,
            self._reported,
            lambda line: terminal.child_line(label, line, error=False),
            lambda line: terminal.child_line(label, line, error=True),
            environment=self.plan.environment,
        )

    def _reported(self, child: Child, report: Report) -> None:
        match report:
            case Ready():
                self.ready = True
            case Leaving() if child is self.child and self._successor is None:
                self._tasks.spawn(self._bring_successor(child), "bring a successor")
            case Hung():
                asyncio.get_running_loop().call_later(KILL_HUNG_S, child.kill)
            case _:
                pass
        self._node.reported(report)

    async def _answer(self, child: Child, code: int) -> bool:
        """Decide about the next start and wait until then; False: there is none."""
        label = self.plan.label
        failure = child.failure
        if child.hung is not None:
            # It may have been killed, for what hangs cannot always be stopped.
            code, reason = ExitCode.STALLED, f"hung: {child.hung.message}"
            self._spec = replace(self._spec, stalls=self._spec.stalls + 1)
        elif code == ExitCode.DRAINED:
            self._node.terminal.say(f"stator: {label} was drained on request; it is not started again")
            return False
        elif code == ExitCode.RESTART:
            self._node.terminal.say(f"stator: {label} was drained on request; starting it again")
            return True
        else:
            reason = describe_exit(code) + (f": {failure.message}" if failure is not None else "")
        if code == ExitCode.CONFIG:
            message = failure.message if failure is not None else f"{label} {reason}"
            self._node.give_up(label, message, ExitCode.CONFIG)
            return False
        if self._policy.num_quick_failures == 0:
            self._first_failure = None
        if code not in (ExitCode.FENCED, ExitCode.STALLED):
            self._first_failure = self._first_failure or reason
        delay_s = self._policy.ended(code, child.ready_for_s())
        if delay_s is None:
            times = self._policy.num_quick_failures
            self._node.give_up(
                label, f"{label} {self._first_failure}\n{label} failed {times} times in a row", ExitCode.FAILURE
            )
            return False
        self._node.terminal.complain(f"stator: {label} {reason}; starting it again in {delay_s:g} s")
        return not await self._node.stopped_within(delay_s)


class Supervisor:
    """Runs `specs` until a signal, or until it gives up; `run` once."""

    def __init__(
        self,
        plans: Sequence[tuple[ProcessPlan, ChildSpec]],
        terminal: Terminal,
        settings: Settings,
        on_ready: Callable[[Serving | None], None],
        on_stopping: Callable[[], None] = lambda: None,
        *,
        on_unused: Callable[[int], None] = lambda _: None,
        on_dead: Callable[[Sequence[str]], None] = lambda _: None,
        has_hub: bool = False,
    ) -> None:
        """on_ready: called once, when every process is ready and, if the node serves clients, requests can finish.
        on_stopping: called when the processes are about to be told to stop. on_unused: called with a listening socket
        that no process will accept from any more. on_dead: called with the keys in discovery of the instances of a
        process that has ended. has_hub: the node stays when all its processes were drained."""
        self.terminal = terminal
        self.settings = settings
        self.stopping = asyncio.Event()
        self.killing = asyncio.Event()
        self._keepers = [_Keeper(self, plan, spec) for plan, spec in plans]
        self._tasks = TaskOwner("supervisor")
        self._on_ready = on_ready
        self._on_stopping = on_stopping
        self._on_unused = on_unused
        self._on_dead = on_dead
        self._has_hub = has_hub
        self._serving: Serving | None = None
        self._told_ready = False
        self._serves_clients = False
        self._outcome = ExitCode.OK
        self._reason: str | None = None

    async def run(self, *, serves_clients: bool) -> ExitCode:
        """serves_clients: ready means that a process has reported an address as well."""
        self._serves_clients = serves_clients
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.signalled)
        # Under nohup a closed terminal is no reason to stop.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGHUP, self.signalled)
        try:
            for keeper in self._keepers:
                self._tasks.spawn(keeper.run(), keeper.plan.label)
            await self.stopping.wait()
            self._on_stopping()
            await self._stop_all()
        finally:
            for keeper in self._keepers:
                keeper.kill()
            await self._tasks.close()
        if self._reason is not None:
            self.terminal.complain(f"stator: {self._reason}")
        return self._outcome

    def signalled(self) -> None:
        if not self.stopping.is_set():
            self.terminal.say("stator: stopping; once more to stop at once")
            self.stopping.set()
        elif not self.killing.is_set():
            self.terminal.complain("stator: stopping at once")
            self._outcome = ExitCode.FAILURE
            self.killing.set()

    def give_up(self, who: str, reason: str, outcome: ExitCode) -> None:
        """Stop the node. The reason is the last thing it says."""
        if self._reason is None and not self.stopping.is_set():
            self._reason, self._outcome = reason, outcome
            self.terminal.complain(f"stator: {who} cannot go on; stopping")
            self.stopping.set()

    def reported(self, report: Report) -> None:
        if isinstance(report, Serving):
            self._serving = report
        elif not isinstance(report, Ready):
            return
        serving = self._serving is not None or not self._serves_clients
        if not self._told_ready and serving and all(keeper.ready or keeper.done.is_set() for keeper in self._keepers):
            self._told_ready = True
            self._on_ready(self._serving)

    def child_ended(self, child: Child) -> None:
        """It may not have said goodbye."""
        if child.keys:
            self._on_dead(child.keys)

    def keeper_done(self) -> None:
        """A process will not be started again."""
        if self.stopping.is_set():
            return
        used = {keeper.listen_fd for keeper in self._keepers if not keeper.done.is_set()}
        for descriptor in {keeper.listen_fd for keeper in self._keepers} - used:
            if descriptor is not None:
                self._on_unused(descriptor)
        if not self._has_hub and all(keeper.done.is_set() for keeper in self._keepers):
            self.terminal.say("stator: nothing is left to run on this node; stopping")
            self.stopping.set()

    async def stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self.stopping.wait()
        except TimeoutError:
            return False
        return True

    async def _stop_all(self) -> None:
        drain = self._tasks.spawn(self._drain(), "drain")
        kill = self._tasks.spawn(self.killing.wait(), "wait for a second signal")
        await asyncio.wait([drain, kill], timeout=self.settings.grace_s, return_when=asyncio.FIRST_COMPLETED)
        left = [keeper for keeper in self._keepers if not keeper.done.is_set()]
        if left and not self.killing.is_set():
            labels = ", ".join(keeper.plan.label for keeper in left)
            grace = f"{self.settings.grace_s:g} s"
            self.terminal.complain(f"stator: {labels} did not stop within {grace}; stopping at once")
        self.killing.set()
        for keeper in left:
            keeper.kill()
        for keeper in left:
            await keeper.done.wait()

    async def _drain(self) -> None:
        for stage in sorted({keeper.plan.stage for keeper in self._keepers}):
            keepers = [keeper for keeper in self._keepers if keeper.plan.stage == stage]
            for keeper in keepers:
                keeper.terminate()
            for keeper in keepers:
                await keeper.done.wait()


def make_specs(
    base: ChildSpec, plans: Sequence[ProcessPlan], listen_fds: Mapping[str, int]
) -> list[tuple[ProcessPlan, ChildSpec]]:
    """base: what is the same for every process of the node. listen_fds: by the name of a process's first service."""
    return [
        (
            plan,
            replace(
                base,
                services=plan.services,
                index=plan.index,
                copies=plan.args.workers,
                listen_fd=listen_fds.get(plan.services[0]),
                overlaps=plan.overlaps,
                supervisor_pid=os.getpid(),
            ),
        )
        for plan in plans
    ]
