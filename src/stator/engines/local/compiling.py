"""Requests that wait for their grammar: it is tried in a process that can be killed (`GrammarGate`), and then compiled
on a thread of its own, so that a step under way need not wait.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from stator.engines.grammar_gate import GrammarGate
from stator.engines.local.grammar import GrammarCompiler, TokenGrammar
from stator.errors import ErrorCode, StatorError
from stator.ids import RequestId
from stator.messages.engine import EngineRequest
from stator.runtime.tasks import TaskOwner
from stator.transport.base import Sink

MAX_WAITING = 256

Add = Callable[[EngineRequest, Sink, TokenGrammar | None], None]


class Compiling:
    """compiler: None for an engine that has no grammars.

    add: called on the loop with each request whose grammar is ready; fail: with the sink of one whose is refused.
    """

    def __init__(self, compiler: GrammarCompiler | None, add: Add, fail: Callable[[Sink, StatorError], None]) -> None:
        self._compiler = compiler
        self._add = add
        self._fail = fail
        self._thread: ThreadPoolExecutor | None = None
        # Without a tokenizer the compiler refuses all.
        self._gate = None if compiler is None or not compiler.path.is_file() else GrammarGate(compiler.path)
        self._tasks = TaskOwner("grammars")
        self._waiting: dict[RequestId, Sink] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._waiting

    def begin(self, request: EngineRequest, sink: Sink) -> None:
        """Raises StatorError(OVERLOADED) if too many wait already."""
        if len(self._waiting) >= MAX_WAITING:
            raise StatorError(ErrorCode.OVERLOADED, f"{MAX_WAITING} requests wait for their grammar already")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="stator-grammar")
        self._waiting[request.request_id] = sink
        compiled = self._tasks.spawn(self._compile(request, self._thread), f"grammar of {request.request_id}")
        compiled.add_done_callback(lambda done: self._compiled(request, sink, done))

    async def _compile(self, request: EngineRequest, thread: ThreadPoolExecutor) -> TokenGrammar | StatorError:
        grammar, compiler = request.sampling.grammar, self._compiler
        assert grammar is not None and compiler is not None, "an engine without grammars refuses them"
        try:
            if self._gate is not None:
                await self._gate.check(grammar)
            return await asyncio.get_running_loop().run_in_executor(thread, compiler.compile, grammar)
        except StatorError as error:
            return error
        except Exception:
            # Whatever a grammar makes the library do, it is this request's fault alone.
            return StatorError(ErrorCode.INVALID_REQUEST, "the form of the answer could not be compiled")

    def _compiled(self, request: EngineRequest, sink: Sink, done: "asyncio.Task[TokenGrammar | StatorError]") -> None:
        if self._waiting.get(request.request_id) is not sink:
            return
        del self._waiting[request.request_id]
        if done.cancelled():
            self._fail(sink, StatorError(ErrorCode.ENGINE_DEAD, "the engine was stopped"))
            return
        made = done.result()
        if isinstance(made, StatorError):
            self._fail(sink, made)
        else:
            self._add(request, sink, made)

    def cancel(self, request_id: RequestId) -> Sink | None:
        """The sink of a request that waits no more; the caller ends it."""
        return self._waiting.pop(request_id, None)

    def cancel_all(self) -> list[Sink]:
        sinks = list(self._waiting.values())
        self._waiting.clear()
        return sinks

    async def close(self) -> None:
        await self._tasks.close()
        if self._gate is not None:
            await self._gate.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.shutdown, wait=True, cancel_futures=True)
