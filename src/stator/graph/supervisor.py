"""One node: the hub if this is the head, and the processes of its services, kept running until told to stop.

Life of a process: started, ready, ended; started again after a while unless the end was asked for, or its
configuration is wrong, or it keeps failing, which stops the node. Stop: processes are asked to drain, consumers
before those they call; what is left when the grace is over is killed; the hub goes last. A second signal kills all at
once.
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
from stator.graph.protocol import ChildSpec, ExitCode, Failed, Ready, Report, Serving
from stator.graph.restart import RestartLimits, RestartPolicy
from stator.graph.terminal import Terminal
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """grace_s: for all processes together to drain and stop."""

    grace_s: float = 30.0
    restart: RestartLimits = field(default_factory=RestartLimits)


class _Keeper:
    """Keeps one planned process running."""

    def __init__(self, node: "Supervisor", plan: ProcessPlan, spec: ChildSpec) -> None:
        self.plan = plan
        self.ready = False
        self.child: Child | None = None
        self.done = asyncio.Event()
        self._node = node
        self._spec = spec
        self._policy = RestartPolicy(node.settings.restart)
        self._first_failure: str | None = None

    async def run(self) -> None:
        try:
            while not self._node.stopping.is_set():
                self.child = await self._start()
                # A stop that came while it was started did not see it.
                if self._node.killing.is_set():
                    self.child.kill()
                elif self._node.stopping.is_set():
                    self.child.terminate()
                code = await self.child.wait()
                self.ready = False
                if self._node.stopping.is_set():
                    return
                if not await self._answer(self.child, code):
                    return
        except ConfigError as error:
            self._node.give_up(self.plan.label, str(error), ExitCode.CONFIG)
        except Exception as error:
            logger.exception("keeping %s running failed", self.plan.label)
            self._node.give_up(self.plan.label, f"{self.plan.label}: {error}", ExitCode.FAILURE)
        finally:
            self.done.set()

    async def _start(self) -> Child:
        label, terminal = self.plan.label, self._node.terminal
        return await start_child(
            self._spec,
            self.plan.args,
            self._report,
            lambda line: terminal.child_line(label, line, error=False),
            lambda line: terminal.child_line(label, line, error=True),
            environment=self.plan.environment,
        )

    def _report(self, report: Report) -> None:
        if isinstance(report, Ready):
            self.ready = True
        self._node.reported(report)

    async def _answer(self, child: Child, code: int) -> bool:
        """Decide about the next start and wait until then; False: there is none."""
        label = self.plan.label
        failure = child.failure
        reason = describe_exit(code) + (f": {failure.message}" if failure is not None else "")
        if code == ExitCode.CONFIG:
            message = failure.message if failure is not None else f"{label} {reason}"
            self._node.give_up(label, message, ExitCode.CONFIG)
            return False
        if self._policy.num_quick_failures == 0:
            self._first_failure = None
        if code != ExitCode.FENCED:
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
    ) -> None:
        """on_ready: called once, when every process is ready and, if the node serves clients, requests can finish.
        on_stopping: called when the processes are about to be told to stop."""
        self.terminal = terminal
        self.settings = settings
        self.stopping = asyncio.Event()
        self.killing = asyncio.Event()
        self._keepers = [_Keeper(self, plan, spec) for plan, spec in plans]
        self._tasks = TaskOwner("supervisor")
        self._on_ready = on_ready
        self._on_stopping = on_stopping
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
                if keeper.child is not None:
                    keeper.child.kill()
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
        elif isinstance(report, Failed):
            return
        serving = self._serving is not None or not self._serves_clients
        if not self._told_ready and serving and all(keeper.ready for keeper in self._keepers):
            self._told_ready = True
            self._on_ready(self._serving)

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
            if keeper.child is not None:
                keeper.child.kill()
        for keeper in left:
            await keeper.done.wait()

    async def _drain(self) -> None:
        for stage in sorted({keeper.plan.stage for keeper in self._keepers}):
            keepers = [keeper for keeper in self._keepers if keeper.plan.stage == stage]
            for keeper in keepers:
                if keeper.child is not None:
                    keeper.child.terminate()
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
                supervisor_pid=os.getpid(),
            ),
        )
        for plan in plans
    ]
