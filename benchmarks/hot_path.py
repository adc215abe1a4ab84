"""CPU time and memory of the frontend process (Frontend, Processor and Router, as `stator serve` runs them).

Decode workers that cost almost nothing answer over TCP from a process of their own, a load client sends from another,
and a hub runs here. Reported is what the operating system says the frontend process used, user and system time, per
request and per streamed token; wall time only where latency is the subject.

    python benchmarks/hot_path.py [--quick] [--repeat N] [--only request,flat,...] [--json FILE] [--instructions]

Loads: `request` (chat, 128 tokens in, 1 out, 64 at once; natural text that never repeats), `words` (the same, but
prompts are 32 words in random order), `flat` (streams of 128, 64 at once, workers step as fast as they are read),
`dense` (the same, but a step each millisecond), `paced` (128 streams of 512, a step each 10 ms per worker, workers
out of phase), `memory` (a fresh process: idle, then 1,000 open streams), `first` (time to first token with a worker
that answers at once, which is what Stator adds).
"""

import argparse
import asyncio
import bisect
import contextlib
import itertools
import json
import os
import platform
import secrets
import socket
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any

import psutil
import uvloop
from hot_path_processes.instructions import Counter
from hot_path_processes.prompts import PROMPTS

from stator.config.models import resolve_model
from stator.config.schema import ServiceArgs
from stator.config.tree import Node
from stator.graph.children import Child, start_child
from stator.graph.protocol import ChildSpec, Failed, Ready, Report, Serving
from stator.hub.server import Hub
from stator.ids import InstanceId
from stator.messages.openai import ChatMessage
from stator.processor.chat_template import ChatTemplate
from stator.processor.tokenizer import ModelTokenizer
from stator.transport import Identity, Listen, RequestPlaneServer

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples" / "llm"
MODEL, NAME = "stator:tiny-llama", "tiny-llama"
NAMESPACE = "benchmark"
BLOCK_SIZE = 16
PROMPT_TOKENS = 128


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process, in nanosecond steps (CPUCLOCK_SCHED of another process)."""
    return time.clock_gettime((~pid << 3) | 2)


def spin_ms() -> float:
    """CPU milliseconds of a fixed piece of work: what the machine's other tenants cost us in caches and core time."""
    best = 1e9
    for _ in range(5):
        started = time.thread_time()
        total = 0
        for number in range(20_000):
            total += number * number % 7
        best = min(best, time.thread_time() - started)
    return best * 1e3


def prompt_length(kind: str) -> int:
    """Of prompts of that kind that make PROMPT_TOKENS with the model's template and tokenizer, on average."""
    directory = resolve_model(MODEL)
    tokenizer = ModelTokenizer.load(directory)
    assert tokenizer.chat_template is not None
    source, origin = tokenizer.chat_template
    template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)

    def tokens(length: int) -> float:
        texts = itertools.islice(PROMPTS[kind](Random(1), length), 50)
        encoded = (tokenizer.encode(template.render([ChatMessage("user", t)]), add_special_tokens=False) for t in texts)
        return statistics.mean(len(each) // 4 for each in encoded)

    return bisect.bisect_left(range(1024), PROMPT_TOKENS, lo=10, key=tokens)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Deployment:
    """hub here; frontend, workers and client in processes of their own."""

    def __init__(
        self,
        pid: int,
        port: int,
        workers: Process | None,
        client: Process,
        options: argparse.Namespace,
        fields: dict[str, Any],
    ) -> None:
        self.seconds: float = options.seconds
        self.pid = pid
        self.port = port
        self._workers = workers
        self._client = client
        self._prompts = {kind: prompt_length(kind) for kind in PROMPTS}
        self._kind: str = options.prompts
        self._fields = fields
        self._seed = 0

    async def period_ms(self, value: float) -> None:
        if self._workers is not None:
            await ask(self._workers, {"period_ms": value})

    async def load(
        self, *, held: Callable[[], Any] | None = None, prompts: str | None = None, **job: Any
    ) -> dict[str, Any]:
        """Run a job of the client. The result has the frontend's CPU seconds in `cpu_s`."""
        self._seed += 1
        kind = prompts or self._kind
        job |= {"prompts": kind, "prompt_length": self._prompts[kind]}
        job |= {"port": self.port, "model": NAME, "seed": self._seed, "fields": self._fields}
        foreign = _busy_s() - cpu_s(self.pid)
        spin = spin_ms()
        split = psutil.Process(self.pid).cpu_times()
        before, started = cpu_s(self.pid), time.monotonic()
        answer = await ask(self._client, job | {"hold": held is not None})
        during = None
        if held is not None:
            assert answer == "open"
            during = held()
            answer = await read(self._client)
        used, wall = cpu_s(self.pid) - before, time.monotonic() - started
        after = psutil.Process(self.pid).cpu_times()
        user, system = after.user - split.user, after.system - split.system
        foreign = (_busy_s() - cpu_s(self.pid) - foreign) / wall
        return {
            **answer,
            "cpu_s": used,
            "during": during,
            "other_cores": foreign,
            "spin_ms": (spin + spin_ms()) / 2,
            "system_share": system / max(user + system, 1e-9),
        }

    def memory(self) -> dict[str, float]:
        process = psutil.Process(self.pid)
        full = process.memory_full_info()
        return {"rss_mb": full.rss / 1e6, "pss_mb": full.pss / 1e6, "threads": process.num_threads()}


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq


async def read(process: Process) -> Any:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError("a helper process ended; its error is above")
    text = line.decode().strip()
    return json.loads(text) if text.startswith("{") else text


async def ask(process: Process, question: dict[str, Any]) -> Any:
    assert process.stdin is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    return await read(process)


def _tree(values: dict[str, Any]) -> Node:
    children = {
        k: _tree(v) if isinstance(v, dict) else Node("benchmark", v, text=None if isinstance(v, str) else str(v))
        for k, v in values.items()
    }
    return Node("benchmark", children=children)


def _sections(port: int, router: str) -> dict[str, Node]:
    model = {"model": MODEL, "block-size": BLOCK_SIZE}
    return {
        "Frontend": _tree({"served_model_name": NAME, "host": "127.0.0.1", "port": port}),
        "Processor": _tree({**model, "served_model_name": NAME, "max-model-len": 2048, "router": router}),
        "Router": _tree({**model, "min-workers": 1, "mode": router}),
    }


async def _start_frontend(
    options: argparse.Namespace, hub: tuple[str, int], token: str, port: int, core: int | None
) -> Child:
    serving = asyncio.get_running_loop().create_future()

    def report(_child: Child, report: Report) -> None:
        if isinstance(report, Failed):
            serving.set_exception(RuntimeError(report.message))
        elif isinstance(report, Serving) and not serving.done():
            serving.set_result(None)
        elif isinstance(report, Ready):
            pass

    def line(text: bytes) -> None:
        # The access log is part of the work: the supervisor reads it from a pipe, and so does this process.
        if b" INFO " not in text:
            sys.stderr.write(text.decode(errors="replace") + "\n")

    spec = ChildSpec(
        target="graphs.agg_router:Frontend",
        directory=str(EXAMPLES),
        services=("Frontend", "Processor", "Router"),
        index=1,
        namespace=NAMESPACE,
        hub=hub,
        token=token,
        host="127.0.0.1",
        advertise="127.0.0.1",
        sections=_sections(port, options.router),
        source="benchmark",
        supervisor_pid=os.getpid(),
        status_fd=-1,
    )
    counter: Counter | None = getattr(options, "counter", None)
    python = None if counter is None else counter.python
    args = ServiceArgs(envs={"STATOR_LOG_LEVEL": options.log_level, "PYTHONHASHSEED": "0"}, python=python)
    child = await start_child(spec, args, report, line, line)
    if core is not None:
        os.sched_setaffinity(child.pid, {core})
    await asyncio.wait_for(serving, 60)
    return child


@contextlib.asynccontextmanager
async def deployed(options: argparse.Namespace) -> AsyncIterator[Deployment]:
    token = secrets.token_hex(16)
    server = RequestPlaneServer(Identity(NAMESPACE, InstanceId("hub"), "hub", token), Listen())
    hub = Hub(server)
    await server.start()
    address = server.addresses[0]
    host, _, hub_port = address.removeprefix("tcp://").rpartition(":")
    cores = sorted(os.sched_getaffinity(0))
    pinned = options.pin and len(cores) > 1
    others = set(cores[1:]) if pinned else set(cores)
    environment = {**os.environ, "STATOR_TOKEN": token}
    port = free_port()
    workers = client = child = None
    try:
        workers = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                str(HERE / "hot_path_processes" / "worker.py"),
                "--hub",
                address,
                "--namespace",
                NAMESPACE,
            ),
            *("--model", NAME, "--block-size", str(BLOCK_SIZE)),
            stdin=PIPE,
            stdout=PIPE,
            env=environment,
        )
        os.sched_setaffinity(workers.pid, others)
        await read(workers)
        client = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "hot_path_processes" / "client.py"), stdin=PIPE, stdout=PIPE
        )
        os.sched_setaffinity(client.pid, others)
        core = cores[0] if pinned else None
        child = await _start_frontend(options, (host, int(hub_port)), token, port, core)
        yield Deployment(child.pid, port, workers, client, options, {"ignore_eos": True})
    finally:
        if child is not None:
            child.kill()
            await child.wait()
        for process in (client, workers):
            if process is not None:
                assert process.stdin is not None
                process.stdin.close()
                await process.wait()
        await hub.close()
        await server.close()


async def measure_request(it: Deployment, quick: bool, prompts: str | None = None) -> dict[str, float]:
    await it.period_ms(0)
    seconds = 0.3 if quick else it.seconds
    seen = await it.load(stream=False, max_tokens=1, connections=64, seconds=seconds, prompts=prompts)
    return {"us_per_request": seen["cpu_s"] / seen["requests"] * 1e6, **_common(seen)}


async def measure_words(it: Deployment, quick: bool) -> dict[str, float]:
    return await measure_request(it, quick, "words")


async def measure_flat(it: Deployment, quick: bool) -> dict[str, float]:
    await it.period_ms(0)
    return await _stream(it, 64, 32 if quick else 128, 0.3 if quick else it.seconds)


async def measure_dense(it: Deployment, quick: bool) -> dict[str, float]:
    await it.period_ms(1)
    return await _stream(it, 64, 32 if quick else 128, 0.3 if quick else it.seconds)


async def measure_paced(it: Deployment, quick: bool) -> dict[str, float]:
    await it.period_ms(10)
    return await _stream(it, 128, 32 if quick else 512, 0)


async def _stream(it: Deployment, connections: int, max_tokens: int, seconds: float) -> dict[str, float]:
    seen = await it.load(stream=True, max_tokens=max_tokens, connections=connections, seconds=seconds)
    return {
        "us_per_token": seen["cpu_s"] / seen["tokens"] * 1e6,
        "us_per_event": seen["cpu_s"] / seen["events"] * 1e6,
        "tokens_per_event": seen["tokens"] / seen["events"],
        "tokens_per_s": seen["tokens"] / seen["wall_s"],
        "gap_p99_ms": seen["gap_p99_ms"],
        **_common(seen),
    }


def _common(seen: dict[str, Any]) -> dict[str, float]:
    return {
        "requests_per_s": seen["requests"] / seen["wall_s"],
        "cores": seen["cpu_s"] / seen["wall_s"],
        "other_cores": seen["other_cores"],
        "spin_ms": seen["spin_ms"],
        "system_share": seen["system_share"],
    }


async def measure_first(it: Deployment, quick: bool) -> dict[str, float]:
    """A worker that sends its first token at once: all of the time to it is ours (and the client's)."""
    await it.period_ms(10)
    alone = await it.load(stream=True, max_tokens=2, connections=1, seconds=0.2 if quick else 2)
    many = await it.load(stream=True, max_tokens=32, connections=32, seconds=0.3 if quick else 3)
    return {
        "alone_p50_ms": alone["first_p50_ms"],
        "alone_p99_ms": alone["first_p99_ms"],
        "c32_p50_ms": many["first_p50_ms"],
        "c32_p99_ms": many["first_p99_ms"],
        "c32_requests_per_s": many["requests"] / many["wall_s"],
    }


async def measure_memory(it: Deployment, quick: bool) -> dict[str, float]:
    """In a fresh process. Each of the streams gets a token every 100 ms."""
    idle = it.memory()
    await it.period_ms(100)
    connections = 50 if quick else 1000
    seen = await it.load(
        stream=True, max_tokens=10 if quick else 64, connections=connections, seconds=0, held=it.memory
    )
    during = seen["during"]
    after = it.memory()
    return {
        "idle_rss_mb": idle["rss_mb"],
        "idle_pss_mb": idle["pss_mb"],
        "threads": idle["threads"],
        "streams": connections,
        "open_rss_mb": during["rss_mb"],
        "open_pss_mb": during["pss_mb"],
        "after_rss_mb": after["rss_mb"],
    }


async def count_instructions(options: argparse.Namespace) -> None:
    """Thousands of instructions of the frontend process for each request (or token), a few hundred requests each."""
    counter: Counter = options.counter
    loads: dict[str, dict[str, Any]] = {
        "request": {"stream": False, "max_tokens": 1, "prompts": "text"},
        "words": {"stream": False, "max_tokens": 1, "prompts": "words"},
        "flat": {"stream": True, "max_tokens": 128, "prompts": "words"},
    }
    async with deployed(options) as it:
        await it.period_ms(0)
        await it.load(stream=False, max_tokens=1, connections=16, seconds=options.seconds)
        for name in options.only.split(",") if options.only else loads:
            await counter.start(it.pid)
            seen = await it.load(**loads[name], connections=32, seconds=options.seconds)
            count = await counter.stop(it.pid)
            unit = "tokens" if loads[name]["stream"] else "requests"
            print(
                f"{name:10} {count / seen[unit] / 1e3:10.1f} thousand instructions of {seen[unit]} {unit}", flush=True
            )


LOADS: dict[str, Callable[[Deployment, bool], Any]] = {
    "request": measure_request,
    "words": measure_words,
    "flat": measure_flat,
    "dense": measure_dense,
    "paced": measure_paced,
    "first": measure_first,
}


async def bench(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    wanted = options.only.split(",") if options.only else [*LOADS, "memory"]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in wanted}
    loads = [name for name in LOADS if name in wanted]
    repeat = 1 if options.quick else options.repeat
    if loads:
        async with deployed(options) as it:
            await it.period_ms(0)
            # Caches, lazy imports and the allocator settle first.
            await it.load(stream=True, max_tokens=8, connections=16, seconds=0.1 if options.quick else 1)
            if options.profile:
                print(f"frontend process {it.pid}", flush=True)
            for _ in range(repeat):
                for name in loads:
                    results[name].append(await LOADS[name](it, options.quick))
    if "memory" in wanted:
        for _ in range(min(repeat, 3)):
            async with deployed(options) as it:
                results["memory"].append(await measure_memory(it, options.quick))
    return results


def show(results: dict[str, list[dict[str, float]]]) -> None:
    for name, runs in results.items():
        print(f"\n{name} (n={len(runs)}): median [min..max]")
        for key in runs[0]:
            values = [run[key] for run in runs]
            print(f"  {key:20} {statistics.median(values):10.2f}  [{min(values):.2f}..{max(values):.2f}]")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return f"{cpu}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a run; short ones find quiet moments")
    parser.add_argument("--only", default="", help="some of the loads, with commas")
    parser.add_argument("--router", default="kv", help="the router's mode")
    parser.add_argument("--prompts", default="text", choices=PROMPTS, help="natural text, or a few words")
    parser.add_argument("--log-level", default="INFO", help="of the frontend; INFO writes a line for each request")
    parser.add_argument("--no-pin", dest="pin", action="store_false", help="leave processes on any core")
    parser.add_argument("--profile", action="store_true", help="print the frontend's process id, for a profiler")
    parser.add_argument(
        "--instructions", action="store_true", help="count them (valgrind) instead of time: exact, but not the kernel's"
    )
    parser.add_argument("--json", type=Path, help="also write every run here")
    options = parser.parse_args()
    print(machine())
    options.counter = None
    if options.instructions:
        with Counter(sys.executable) as options.counter:
            uvloop.run(count_instructions(options))
        return
    results = uvloop.run(bench(options))
    show(results)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
