"""Real vLLM engines for tests: one process imports vllm, and is forked once for each engine.

Run as a script with the address of a Unix socket and a number: so many children connect to the socket, start an engine
with the arguments they are sent, and do what they are told. An engine computes in its child's own process, step by
step, for as long as it has anything to do, as vLLM's engine core does.
"""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Generator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300.0
IDLE_POLL_S = 0.001
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class RemoteEngine:
    """One child. Every method waits for its answer and raises RuntimeError with the child's traceback."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.pid: int = connection.recv()

    def start(self, **engine_args: Any) -> None:
        self._ask("start", engine_args)

    def submit(self, name: str, ids: list[int], max_tokens: int, params: dict[str, Any] | None = None) -> None:
        self._ask("submit", name, ids, max_tokens, params)

    def wait(self, name: str) -> dict[str, Any]:
        """{"ids", "cached", "params", "reason"} of a finished request."""
        return self._ask("wait", name)

    def run(self, name: str, ids: list[int], max_tokens: int, params: dict[str, Any] | None = None) -> dict[str, Any]:
        self.submit(name, ids, max_tokens, params)
        return self.wait(name)

    def abort(self, name: str) -> None:
        self._ask("abort", name)

    def reset_prefix_cache(self) -> None:
        assert self._ask("reset")

    def state(self) -> dict[str, Any]:
        """{"used": KV blocks in use, "requests": known to the scheduler}, and of our connector "counts" and
        "loads": its tasks."""
        return self._ask("state")

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """vLLM's collective_rpc."""
        return self._ask("call", method, args)

    def wait_idle(self) -> dict[str, Any]:
        """Steps until nothing is left to do; the state then."""
        return self._ask("idle")

    def _ask(self, *question: Any) -> Any:
        self._connection.send(question)
        if not self._connection.poll(START_TIMEOUT_S):
            raise TimeoutError(f"the engine did not answer {question[0]}")
        good, answer = self._connection.recv()
        if not good:
            raise RuntimeError(answer)
        return answer


@contextlib.contextmanager
def engine_processes(count: int, directory: Path) -> Generator[list[RemoteEngine]]:
    address = str(directory / "engines")
    environment = {**os.environ, **ENVIRONMENT}
    with Listener(address, "AF_UNIX") as listener:
        zygote = subprocess.Popen([sys.executable, __file__, address, str(count)], env=environment, text=True)
        connections: list[Connection] = []
        try:
            listener._listener._socket.settimeout(START_TIMEOUT_S)  # type: ignore[attr-defined]
            connections += [listener.accept() for _ in range(count)]
            yield [RemoteEngine(connection) for connection in connections]
        finally:
            # A child ends when its connection does, the first process when its children have ended.
            for connection in connections:
                connection.close()
            try:
                zygote.wait(30)
            except subprocess.TimeoutExpired:
                zygote.kill()
                zygote.wait()


class _Child:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._results: dict[str, dict[str, Any]] = {}
        self._waiting: str | None = None
        self._idle = False

    def serve(self) -> None:
        self._connection.send(os.getpid())
        with contextlib.suppress(EOFError):
            while True:
                # One question between two steps, as vLLM's core takes what has come and goes on.
                if self._connection.poll(IDLE_POLL_S if self._busy() else None):
                    question, *args = self._connection.recv()
                    try:
                        answered, answer = getattr(self, f"on_{question}")(*args)
                    except Exception:
                        self._connection.send((False, traceback.format_exc()))
                    else:
                        if answered:
                            self._connection.send((True, answer))
                self._step()

    def on_start(self, engine_args: dict[str, Any]) -> tuple[bool, Any]:
        from vllm import LLM

        self._llm = LLM(**engine_args)
        self._engine = self._llm.llm_engine
        self._core: Any = self._engine.engine_core.engine_core
        return True, None

    def on_submit(self, name: str, ids: list[int], max_tokens: int, params: dict[str, Any] | None) -> tuple[bool, Any]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        extra = None if params is None else {"kv_transfer_params": params}
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=ids), sampling)
        return True, None

    def on_wait(self, name: str) -> tuple[bool, Any]:
        self._waiting = name
        return False, None

    def on_abort(self, name: str) -> tuple[bool, Any]:
        self._engine.abort_request([name])
        return True, None

    def on_reset(self) -> tuple[bool, Any]:
        return True, self._llm.reset_prefix_cache()

    def on_state(self) -> tuple[bool, Any]:
        from dataclasses import asdict

        from vllm.distributed.kv_transfer import get_kv_transfer_group

        scheduler = self._core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        state: dict[str, Any] = {
            "used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "requests": len(scheduler.requests),
        }
        if (book := getattr(scheduler.connector, "_book", None)) is not None:
            state["counts"] = asdict(book.counts())
            state["loads"] = len(get_kv_transfer_group()._worker._loads)
        return True, state

    def on_call(self, method: str, args: tuple[Any, ...]) -> tuple[bool, Any]:
        return True, self._llm.collective_rpc(method, args=args)

    def on_idle(self) -> tuple[bool, Any]:
        self._idle = True
        return False, None

    def _busy(self) -> bool:
        return hasattr(self, "_core") and (self._core.scheduler.has_requests() or self._idle or bool(self._waiting))

    def _step(self) -> None:
        if not hasattr(self, "_core"):
            return
        if self._core.scheduler.has_requests():
            for output in self._engine.step():
                if output.finished:
                    (one,) = output.outputs
                    self._results[output.request_id] = {
                        "ids": list(one.token_ids),
                        "cached": output.num_cached_tokens,
                        "params": output.kv_transfer_params,
                        "reason": one.finish_reason,
                    }
        if self._waiting in self._results:
            self._connection.send((True, self._results.pop(self._waiting)))
            self._waiting = None
        if self._idle and not self._core.scheduler.has_requests():
            self._idle = False
            self._connection.send((True, self.on_state()[1]))


def main(address: str, count: int) -> None:
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    children: list[int] = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            with Client(address, "AF_UNIX") as connection:
                _Child(connection).serve()
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
