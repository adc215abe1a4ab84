"""What clients that mean no good cost a frontend process, and the honest ones beside them.

Frontend, Processor and Router run in one process as `stator serve` starts them, decode workers that cost almost nothing
in another (both as in hot_path.py), honest clients in a third: short streams, half of them on new connections. From
here come, one scene after the other, over loopback:

- connections that say nothing, and connections that send garbage
- heads of requests that never end, few and many, and large bodies whose last byte never comes
- readers of long streams who read nothing

    python benchmarks/hostile_clients.py [--quick] [--connections 10000] [--only idle,garbage,...] [--json FILE]

For each scene: memory of the frontend process (RSS) before, at its peak and after; how many of the connections it held
at most, and after how many seconds they were all gone, by its own timeouts (with --quick the clients leave by
themselves); and of the honest clients time to first token and errors.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil
import uvloop
from hot_path import NAME, Deployment, deployed, machine

HOST = "127.0.0.1"
HONEST = 8
PERIOD_MS = 50.0
"""A worker's step. A slow reader's stream then brings about 5 KB a second."""
BODY_BYTES = 8 * 1024 * 1024
QUICK_BODY_BYTES = 256 * 1024
HEAD_BYTES = 15 * 1024
PATIENCE_S = 260.0


@dataclass
class Scene:
    name: str
    connections: int
    before_mb: float
    peak_mb: float = 0.0
    after_mb: float = 0.0
    held: int = 0
    gone_s: float | None = None
    answers: int = 0
    errors: int = 0
    first_p50_ms: float = 0.0
    first_p99_ms: float = 0.0
    first_max_ms: float = 0.0


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def request(*, max_tokens: int, words: int = 12, rng: Random | None = None) -> bytes:
    rng = rng or Random()
    text = " ".join(rng.choices(("red", "stone", "river", "light", "garden", "winter"), k=words))
    body = json.dumps(
        {
            "model": NAME,
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "max_tokens": max_tokens,
            "ignore_eos": True,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


# Honest clients, in a process of their own: a line of JSON for each request.


async def _ask(port: int, kept: list[Any], rng: Random, fresh: bool) -> float:
    """Milliseconds to the first token. Raises if the answer is not one, or not whole."""
    begun = time.perf_counter()
    if fresh or not kept:
        for _, writer in kept:
            writer.close()
        kept[:] = [await asyncio.open_connection(HOST, port)]
    reader, writer = kept[0]
    writer.write(request(max_tokens=8, rng=rng))
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise ConnectionError(head.split(b"\r\n")[0].decode())
    await reader.readuntil(b'{"content":"')
    first = (time.perf_counter() - begun) * 1e3
    await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    return first


async def honest(port: int) -> None:
    async def client(number: int) -> None:
        rng, kept = Random(number), []
        for count in range(1 << 30):
            try:
                async with asyncio.timeout(20):
                    line: dict[str, Any] = {"first_ms": await _ask(port, kept, rng, fresh=count % 2 == 0)}
            except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError) as error:
                kept.clear()
                line = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(line), flush=True)
            await asyncio.sleep(0.1)

    await asyncio.gather(*(client(number) for number in range(HONEST)))


# Hostile ones.


@dataclass
class Crowd:
    """The sockets of one scene. Each scene has a source address of its own, so that ports do not run out."""

    port: int
    source: str
    body_bytes: int
    sockets: list[socket.socket] = field(default_factory=list)

    def connect(self, count: int, *, receive_buffer: int | None = None) -> Iterator[socket.socket]:
        for _ in range(count):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if receive_buffer is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            sock.settimeout(20)
            sock.bind((self.source, 0))
            sock.connect((HOST, self.port))
            self.sockets.append(sock)
            yield sock

    def send(self, sock: socket.socket, data: bytes) -> None:
        with contextlib.suppress(OSError):
            sock.sendall(data)

    def leave(self) -> None:
        for sock in self.sockets:
            sock.close()


GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    b"\x00" * 512,
    b"GET nonsense\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\n",
)
"""A TLS client, zeros, not quite HTTP, and HTTP/2, of which more is expected."""


def idle(crowd: Crowd, count: int) -> None:
    for _ in crowd.connect(count):
        pass


def garbage(crowd: Crowd, count: int) -> None:
    for number, sock in enumerate(crowd.connect(count)):
        crowd.send(sock, GARBAGE[number % len(GARBAGE)])


def half_heads(crowd: Crowd, count: int) -> None:
    for sock in crowd.connect(count):
        crowd.send(sock, b"POST /v1/chat/completions HTTP/1.1\r\nx-filler: " + b"y" * (HEAD_BYTES - 60))


def half_bodies(crowd: Crowd, count: int) -> None:
    """All but the last byte, a quarter at a time, as fast as the server takes it."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n{" % crowd.body_bytes
    left = {sock: crowd.body_bytes - 2 for sock in crowd.connect(count) if crowd.send(sock, head) is None}
    part = b" " * (crowd.body_bytes // 4)
    deadline = time.monotonic() + 25
    for sock in left:
        sock.setblocking(False)
    while left and time.monotonic() < deadline:
        for sock, num_bytes in list(left.items()):
            try:
                left[sock] -= sock.send(part[:num_bytes])
            except BlockingIOError:
                continue
            except OSError:
                left[sock] = 0
            if left[sock] <= 0:
                del left[sock]
        time.sleep(0.001)


def slow_readers(crowd: Crowd, count: int) -> None:
    rng = Random(1)
    for sock in crowd.connect(count, receive_buffer=2048):
        crowd.send(sock, request(max_tokens=1900, rng=rng))


@dataclass(frozen=True)
class Script:
    play: Callable[[Crowd, int], None]
    share: float
    """Of --connections."""


SCENES = {
    "idle": Script(idle, 1.0),
    "garbage": Script(garbage, 1.0),
    "half heads": Script(half_heads, 0.02),
    "many half heads": Script(half_heads, 1.0),
    "half bodies": Script(half_bodies, 0.02),
    "slow readers": Script(slow_readers, 0.1),
}


class Frontend:
    """The process that is measured."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._num_others = self._process.num_fds()
        self.honest = 0

    def rss_mb(self) -> float:
        return self._process.memory_info().rss / 1e6

    def connections(self) -> int:
        """Of hostile clients, but for those of honest ones that come and go."""
        return max(0, self._process.num_fds() - self._num_others - self.honest)


class Answers:
    """What the honest clients saw."""

    def __init__(self) -> None:
        self.first_ms: list[float] = []
        self.errors: list[str] = []

    async def read(self, stream: asyncio.StreamReader) -> None:
        while line := await stream.readline():
            seen = json.loads(line)
            if "error" in seen:
                self.errors.append(seen["error"])
            else:
                self.first_ms.append(seen["first_ms"])


async def play(
    name: str, number: int, it: Deployment, frontend: Frontend, answers: Answers, options: argparse.Namespace
) -> Scene:
    script = SCENES[name]
    count = max(20, round(options.connections * script.share))
    scene = Scene(name, count, frontend.rss_mb())
    crowd = Crowd(it.port, f"127.0.0.{number + 2}", QUICK_BODY_BYTES if options.quick else BODY_BYTES)
    answers.first_ms, answers.errors = [], []
    begun = time.monotonic()
    playing = asyncio.get_running_loop().run_in_executor(None, script.play, crowd, count)
    deadline = begun + (0.2 if options.quick else PATIENCE_S)
    while True:
        await asyncio.sleep(0.02 if options.quick else 0.1)
        held = frontend.connections()
        scene.held = max(scene.held, held)
        scene.peak_mb = max(scene.peak_mb, frontend.rss_mb())
        # Honest clients leave and come all the time.
        if playing.done() and held <= HONEST:
            scene.gone_s = time.monotonic() - begun
            break
        if playing.done() and time.monotonic() > deadline:
            break
    await playing
    crowd.leave()
    await asyncio.sleep(0.1 if options.quick else 2.0)
    scene.after_mb = frontend.rss_mb()
    scene.answers, scene.errors = len(answers.first_ms), len(answers.errors)
    for error in answers.errors[:3]:
        print(f"  honest client: {error}", flush=True)
    scene.first_p50_ms = quantile(answers.first_ms, 0.5)
    scene.first_p99_ms = quantile(answers.first_ms, 0.99)
    scene.first_max_ms = max(answers.first_ms, default=0.0)
    return scene


HEADLINE = (
    f"{'scene':>16} {'clients':>8} {'RSS before':>11} {'peak':>7} {'after MB':>9} {'held':>7} {'gone after':>11} "
    f"{'answers':>8} {'errors':>7} {'TTFT p50':>9} {'p99':>7} {'max ms':>7}"
)


def show(scene: Scene) -> None:
    gone = "-" if scene.gone_s is None else f"{scene.gone_s:.1f} s"
    print(
        f"{scene.name:>16} {scene.connections:>8} {scene.before_mb:>11.1f} {scene.peak_mb:>7.1f} "
        f"{scene.after_mb:>9.1f} {scene.held:>7} {gone:>11} {scene.answers:>8} {scene.errors:>7} "
        f"{scene.first_p50_ms:>9.1f} {scene.first_p99_ms:>7.1f} {scene.first_max_ms:>7.1f}",
        flush=True,
    )


async def bench(options: argparse.Namespace) -> list[Scene]:
    async with deployed(options) as it:
        await it.period_ms(10 if options.quick else PERIOD_MS)
        frontend = Frontend(it.pid)
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--honest", str(it.port), stdout=asyncio.subprocess.PIPE
        )
        answers = Answers()
        assert process.stdout is not None
        reading = asyncio.ensure_future(answers.read(process.stdout))
        scenes: list[Scene] = []
        try:
            if not options.quick:
                await asyncio.sleep(10)
            while not answers.first_ms:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            frontend.honest = max(0, frontend.connections())
            print(HEADLINE, flush=True)
            if not options.quick:
                alone = Scene("(none)", 0, frontend.rss_mb(), frontend.rss_mb(), frontend.rss_mb())
                alone.answers, alone.errors = len(answers.first_ms), len(answers.errors)
                alone.first_p50_ms = quantile(answers.first_ms, 0.5)
                alone.first_p99_ms = quantile(answers.first_ms, 0.99)
                alone.first_max_ms = max(answers.first_ms)
                show(alone)
            for number, name in enumerate(options.only.split(",") if options.only else SCENES):
                scenes.append(await play(name, number, it, frontend, answers, options))
                show(scenes[-1])
        finally:
            process.kill()
            await process.wait()
            await reading
        return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few clients for a moment, to see that it runs")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--only", default="", help="some of the scenes, with commas")
    parser.add_argument("--log-level", default="INFO", help="of the frontend")
    parser.add_argument("--router", default="kv", help="the router's mode")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--honest", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.honest is not None:
        uvloop.run(honest(options.honest))
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.quick:
        options.connections = 200
    elif hard != resource.RLIM_INFINITY and hard < options.connections + 100:
        sys.exit(f"{options.connections} connections need as many open files, and the hard limit is {hard}")
    options.seconds, options.prompts, options.pin = 1.0, "words", False
    print(f"{machine()}; open files: {hard}")
    scenes = uvloop.run(bench(options))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(scene) for scene in scenes], indent=1))


if __name__ == "__main__":
    main()
