"""An event loop whose time jumps, and nodes: processes that share the loop and nothing else.

A node is a value of a context variable. Tasks, callbacks and timers that are made in a node's context are the node's:
while it is paused they are held, in order, as a stopped process's are; once it is dead they never run. What belongs to
no node is the world's: the network, the supervisor, the test.

There is no selector, no thread and no real time here. Work for a thread is done at once on the loop.
"""

import asyncio
import contextlib
import gc
import heapq
import logging
import math
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar, copy_context
from enum import Enum
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

MAX_TURNS_AT_ONCE = 200_000
"""Turns of the loop without time passing, after which the program counts as one that spins."""


class NodeState(Enum):
    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


class Node:
    """One process. host: its address on the network; several nodes may share it."""

    def __init__(self, loop: "SimLoop", name: str, host: str) -> None:
        self.name = name
        self.host = host
        self.state = NodeState.RUNNING
        self.context = Context()
        self.context.run(_NODE.set, self)
        self.on_death: list[Callable[[], None]] = []
        self._loop = loop
        self.tasks: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._held: list[asyncio.Handle] = []
        self._buried: list[Any] = []

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str | None = None) -> "asyncio.Task[T]":
        return self._loop.create_task(coroutine, name=name, context=self.context.copy())

    def pause(self) -> None:
        """As SIGSTOP. What happens to it meanwhile it learns when it goes on."""
        if self.state is NodeState.RUNNING:
            self.state = NodeState.PAUSED

    def resume(self) -> None:
        """As SIGCONT."""
        if self.state is NodeState.PAUSED:
            self.state = NodeState.RUNNING
            held, self._held = self._held, []
            self._loop.make_ready(held)

    def kill(self) -> None:
        """As SIGKILL: nothing of it runs any more, not even a `finally`. Idempotent."""
        if self.state is NodeState.DEAD:
            return
        self.state = NodeState.DEAD
        # What nobody refers to any more would be finalized, and so run after all.
        self._buried += self.tasks
        self._buried += self._held
        self._held = []
        for callback in self.on_death:
            callback()

    def admit(self, handle: asyncio.Handle) -> bool:
        """Whether the node's handle may run now; if not, it is kept."""
        if self.state is NodeState.RUNNING:
            return True
        (self._held if self.state is NodeState.PAUSED else self._buried).append(handle)
        return False


_NODE: ContextVar[Node | None] = ContextVar("node", default=None)


def current_node() -> Node | None:
    """The node whose code is running; None for the world's."""
    return _NODE.get()


class _Handle(asyncio.Handle):
    __slots__ = ("_node",)

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], loop: "SimLoop", context: Context | None
    ) -> None:
        context = copy_context() if context is None else context
        super().__init__(callback, args, loop, context)
        self._node = context.get(_NODE)

    def _run(self) -> None:
        node = self._node
        if node is None or node.admit(self):
            super()._run()


class _TimerHandle(asyncio.TimerHandle):
    __slots__ = ("_node",)

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: "SimLoop",
        context: Context | None,
    ) -> None:
        context = copy_context() if context is None else context
        super().__init__(when, callback, args, loop, context)
        self._node = context.get(_NODE)

    def _run(self) -> None:
        node = self._node
        if node is None or node.admit(self):
            super()._run()


class SimNetwork(Protocol):
    """What the loop's socket methods are sent to."""

    async def connect(self, factory: Callable[[], asyncio.BaseProtocol], host: str, port: int) -> tuple[Any, Any]: ...

    def serve(
        self, factory: Callable[[], asyncio.BaseProtocol], host: str | None, port: int, sock: Any
    ) -> asyncio.AbstractServer: ...


class SimLoop(asyncio.BaseEventLoop):
    """Starts at 0.0. Use it through `run_sim`."""

    _ready: deque[asyncio.Handle]
    """BaseEventLoop's own."""

    def __init__(self) -> None:
        super().__init__()
        self.network: SimNetwork | None = None
        self.num_handles = 0
        self._now = 0.0
        self._turns_at_once = 0
        self._num_timers = 0
        self._timers: list[tuple[float, int, _TimerHandle]] = []
        self._over = False
        # The dead ones too: what nobody refers to any more would be finalized, and so run after all.
        self._nodes: list[Node] = []

    def node(self, name: str, host: str) -> Node:
        node = Node(self, name, host)
        self._nodes.append(node)
        return node

    def time(self) -> float:
        return self._now

    # Scheduling.

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = _Handle(callback, args, self, context)
        if not self._over:
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = _TimerHandle(when, callback, args, self, context)
        if not self._over:
            self._num_timers += 1
            heapq.heappush(self._timers, (when, self._num_timers, handle))
        return handle

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, context: Context | None = None, **options: Any
    ) -> "asyncio.Task[T]":
        task = super().create_task(coro, context=context, **options)
        node = _NODE.get() if context is None else context.get(_NODE)
        if node is not None:
            node.tasks.add(task)
        return task

    def make_ready(self, handles: list[asyncio.Handle]) -> None:
        self._ready.extend(handles)

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready:
            self._advance()
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        self._turns_at_once += 1
        if self._turns_at_once > MAX_TURNS_AT_ONCE:
            raise RuntimeError(f"the program spins at {self._now:g} s: {ready[0]!r}")
        self.num_handles += len(ready)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle.cancelled():
                handle._run()

    def _advance(self) -> None:
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            raise RuntimeError("every task waits and no timer is set: this program would never continue")
        if timers[0][0] > self._now:
            self._now = timers[0][0]
            self._turns_at_once = 0

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def _process_events(self, event_list: Any) -> None:
        raise NotImplementedError("there are no file descriptors on this loop")

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override]
        """Done before it returns, as far as this thread can tell; delivered by the loop's next turn."""
        future: asyncio.Future[T] = self.create_future()
        try:
            result = func(*args)
        except Exception as error:
            self.call_soon(_fail, future, error)
        else:
            self.call_soon(_succeed, future, result)
        return future

    # Sockets.

    async def create_connection(  # type: ignore[override]
        self, protocol_factory: Callable[[], Any], host: str, port: int, **_options: Any
    ) -> tuple[Any, Any]:
        assert self.network is not None, "this loop has no network"
        return await self.network.connect(protocol_factory, host, port)

    async def create_server(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], Any],
        host: str | None = None,
        port: int | None = None,
        *,
        sock: Any = None,
        **_options: Any,
    ) -> asyncio.AbstractServer:
        assert self.network is not None, "this loop has no network"
        return self.network.serve(protocol_factory, host, port or 0, sock)

    # The end.

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._over:
            super().call_exception_handler(context)

    def finish(self) -> None:
        """Close the loop with everything that still waits on it, running none of it."""
        self._over = True
        tasks = asyncio.all_tasks(self)
        self._ready.clear()
        self._timers.clear()
        self.close()
        with _quietly():
            self._nodes.clear()
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                with contextlib.suppress(BaseException):
                    task.get_coro().close()  # type: ignore[union-attr]
            tasks.clear()
            gc.collect()


def _succeed(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _ignore(_: object) -> None:
    return


@contextlib.contextmanager
def _quietly() -> Generator[None]:
    """What finalizers of dead code complain about is of no interest."""
    hook, sys.unraisablehook = sys.unraisablehook, _ignore
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = hook
        logging.disable(disabled)


async def until(holds: Callable[[], bool], within_s: float = math.inf, *, every_s: float = 0.1) -> bool:
    """Look every so often, which on virtual time costs nothing real. False if it did not come to hold in time."""
    loop = asyncio.get_running_loop()
    end = loop.time() + within_s
    while not holds():
        if loop.time() >= end:
            return False
        await asyncio.sleep(every_s)
    return True


def run_sim(main: Callable[[SimLoop], Coroutine[Any, Any, T]]) -> T:
    """Run main(loop) on a new SimLoop until it returns; what else is on the loop ends there.

    The garbage collector rests meanwhile: when it runs depends on the process's past, and finalizers are code.
    """
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    loop = SimLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.finish()
        # A server of the product may have put all that there was out of the collector's sight.
        gc.unfreeze()
        if collecting:
            gc.enable()
