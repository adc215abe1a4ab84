"""The hot path of hot_path.py beside NVIDIA Dynamo's, on one machine and in turn, so that only their ratio matters.

    python benchmarks/hot_path_dynamo.py --dynamo /path/to/venv/bin/python [--repeat N] [--seconds S] [--json FILE]

Both get the same prompts from the same load client; reported is the CPU time of the frontend process with its router in
KV mode. Dynamo's workers are its mocker at a million times its speed, with four workers; Stator's are those of
hot_path.py. Discovery of Dynamo's is by files. Installing it (1.6.1, with a dependency that the registry lacks):

    pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
    pip install 'pydantic<2.14' uvloop aiohttp 'kubernetes<33' msgspec 'prometheus-client<1' pyzmq 'redis<9' \
        transformers 'zstandard<1'
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import statistics
import sys
import tempfile
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from hot_path import BLOCK_SIZE, HERE, LOADS, MODEL, NAME, Deployment, deployed, free_port, machine

from stator.config.models import resolve_model

COMPARED = ("request", "words", "flat")
START_S = 60.0


def _environment(directory: str) -> dict[str, str]:
    local = dict.fromkeys(("DYN_EVENT_PLANE_HOST", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"), "127.0.0.1")
    files = {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": directory}
    return {**os.environ, **local, **files, "DYN_LOG": "warn", "HF_HUB_OFFLINE": "1"}


@contextlib.asynccontextmanager
async def dynamo(options: argparse.Namespace) -> AsyncIterator[Deployment]:
    cores = sorted(os.sched_getaffinity(0))
    core, others = ({cores[0]}, set(cores[1:])) if len(cores) > 1 else (set(cores), set(cores))
    port = free_port()
    processes: list[Process] = []
    with tempfile.TemporaryDirectory() as directory:
        environment = _environment(directory)

        async def start(*command: str, on: set[int], **pipes: Any) -> Process:
            process = await asyncio.create_subprocess_exec(*command, env=environment, **pipes)
            os.sched_setaffinity(process.pid, on)
            processes.append(process)
            return process

        try:
            model = str(resolve_model(MODEL))
            mocker = ("--model-path", model, "--model-name", NAME, "--num-workers", "4")
            speed = ("--speedup-ratio", "1000000", "--block-size", str(BLOCK_SIZE))
            await start(
                options.dynamo, "-m", "dynamo.mocker", *mocker, *speed, on=others, stdout=DEVNULL, stderr=DEVNULL
            )
            http_at = ("--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", "kv")
            frontend = await start(
                options.dynamo, "-m", "dynamo.frontend", *http_at, on=core, stdout=DEVNULL, stderr=DEVNULL
            )
            client = str(HERE / "hot_path_processes" / "client.py")
            load = await start(sys.executable, client, on=others, stdin=PIPE, stdout=PIPE)
            await asyncio.wait_for(_answers(port), START_S)
            yield Deployment(frontend.pid, port, None, load, options, {})
        finally:
            for process in processes:
                if process.returncode is None:
                    process.terminate()
            for process in processes:
                await process.wait()


async def _answers(port: int) -> None:
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1})

    def ask() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    while not await asyncio.to_thread(ask):  # noqa: ASYNC110  (another program, which only answers)
        await asyncio.sleep(0.2)


def _cost(run: dict[str, float]) -> float:
    return run["us_per_request"] if "us_per_request" in run else run["us_per_token"]


async def bench(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    costs: dict[str, dict[str, list[float]]] = {load: {"stator": [], "dynamo": []} for load in COMPARED}
    async with deployed(options) as ours, dynamo(options) as theirs:
        systems = {"stator": ours, "dynamo": theirs}
        for system in systems.values():
            await system.load(stream=True, max_tokens=8, connections=16, seconds=1)
        for _ in range(options.repeat):
            for load in COMPARED:
                for name, system in systems.items():
                    costs[load][name].append(_cost(await LOADS[load](system, False)))
    return costs


def show(costs: dict[str, dict[str, list[float]]]) -> None:
    for load, by_system in costs.items():
        unit = "us per token" if load == "flat" else "us per request"
        pairs = zip(by_system["stator"], by_system["dynamo"], strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        middle = {name: statistics.median(values) for name, values in by_system.items()}
        print(
            f"{load:8} {unit:15} stator {middle['stator']:8.1f}  dynamo {middle['dynamo']:8.1f}  "
            f"ratio of pairs {statistics.median(ratios):.2f} [{ratios[0]:.2f}..{ratios[-1]:.2f}] n={len(ratios)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without --dynamo nothing is compared, and that is said")
    parser.add_argument("--dynamo", help="the interpreter of a virtual environment with ai-dynamo")
    parser.add_argument("--repeat", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="also write every run here")
    parser.set_defaults(router="kv", prompts="text", log_level="WARNING", pin=True)
    options = parser.parse_args()
    if options.dynamo is None:
        print("nothing compared: --dynamo names the interpreter of an environment with ai-dynamo")
        return
    print(machine())
    costs = uvloop.run(bench(options))
    show(costs)
    if options.json is not None:
        options.json.write_text(json.dumps(costs, indent=1))


if __name__ == "__main__":
    main()
