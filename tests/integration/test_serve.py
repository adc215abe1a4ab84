"""`stator serve` as a user runs it: real processes, small services of the user's own, loopback only."""

import contextlib
import importlib.util
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

WAIT_S = 20.0

SERVICES = """
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from stator.errors import ConfigError
from stator.graph import ServiceContext, depends, endpoint, on_drain, on_start, on_stop, service


class Word(msgspec.Struct, frozen=True):
    text: str


class EchoConfig(msgspec.Struct, frozen=True, kw_only=True):
    greeting: str = "hello"
    fail: str | None = None
    stuck: bool = False


@service(role="echo", config=EchoConfig)
class Echo:
    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.config = context.config
        print(f"echo pid={os.getpid()} greeting={self.config.greeting} env={os.environ.get('COLOUR')}")
        print("token in the environment:", "STATOR_TOKEN" in os.environ)
        if self.config.fail == "config":
            raise ConfigError("Echo.fail: found config, expected something better")
        if self.config.fail == "crash":
            raise RuntimeError("no engine here")
        if self.config.fail == "differently":
            tries = Path("tries")
            tries.write_text((tries.read_text() if tries.exists() else "") + "x")
            raise RuntimeError("the port is taken" if tries.read_text() == "x" else "the lock is held")
        print("sees", {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")})
        print(f"runs on {sys.executable}")

    @endpoint
    async def echo(self, request: Word) -> AsyncIterator[Word]:
        for letter in f"{self.config.greeting} {request.text}":
            yield Word(letter)

    @on_drain
    async def drain(self) -> None:
        print("echo drains")
        if self.config.stuck:
            import asyncio

            await asyncio.Event().wait()

    @on_stop
    async def stop(self) -> None:
        print("echo stops")


@service(role="helper", colocate=True)
class Helper:
    @endpoint
    async def pid(self, request: Word) -> Word:
        return Word(f"{request.text}{os.getpid()}")


@service(role="main")
class Main:
    echo = depends(Echo)
    helper = depends(Helper)

    @on_start
    async def start(self, context: ServiceContext) -> None:
        self.context = context
        context.tasks.spawn(self.work(), "work")

    async def work(self) -> None:
        if self.helper.linked:
            print("colocated:", (await self.helper.pid(Word(""))).text == str(os.getpid()))
        seen: set[str] = set()
        while True:
            infos = self.context.directory.instances(role="echo")
            print(f"{len(infos)} instances")
            for info in infos:
                if info.instance_id not in seen:
                    seen.add(info.instance_id)
                    text = ""
                    target = next(t for t in self.echo.targets("echo") if t.instance_id == info.instance_id)
                    async for words in self.echo.stream("echo", Word("you"), target=target):
                        text += "".join(word.text for word in words)
                    print(f"answer from pid={info.pid}: {text}")
            known = {i.instance_id for i in infos}
            await self.context.directory.wait_for(
                lambda d: {i.instance_id for i in d.instances(role="echo")} != known, None
            )

    @on_drain
    def drain(self) -> None:
        print("main drains")
"""

GRAPH = """
from services import Echo, Helper, Main

Main.link(Helper)
Main.link(Echo)
"""


class Node:
    """A `stator serve` that runs; its lines are read as they come."""

    def __init__(self, directory: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("STATOR_", "NATS_", "ETCD"))
        }
        environment |= {"XDG_STATE_HOME": str(directory / "state"), **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stator.cli.main", *arguments],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def until(self, pattern: str, times: int = 1) -> re.Match[str]:
        """The match in the line in which `pattern` was found for the given time, counted over all lines so far."""
        found = [match for line in self.lines if (match := re.search(pattern, line))]
        deadline = time.monotonic() + WAIT_S
        while len(found) < times:
            try:
                line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{pattern!r} did not come in {WAIT_S} s:\n{self.text}") from None
            assert line is not None, f"the node ended before {pattern!r} came:\n{self.text}"
            self.lines.append(line)
            if match := re.search(pattern, line):
                found.append(match)
        return found[times - 1]

    def ended(self) -> int:
        """The exit code; every line was read."""
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        while (line := self._new.get(timeout=WAIT_S)) is not None:
            self.lines.append(line)
        return code

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        self.signal(signal.SIGINT)
        return self.ended()

    def close(self) -> None:
        """Whatever a failed test left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


Start = Callable[..., Node]
LOOPBACK = ("--host", "127.0.0.1")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "services.py").write_text(SERVICES)
    (tmp_path / "graph.py").write_text(GRAPH)
    nodes: list[Node] = []

    def start_node(*arguments: str, env: dict[str, str] | None = None, config: str | None = None) -> Node:
        if config is not None:
            (tmp_path / "c.yaml").write_text(config)
            arguments = (*arguments, "-f", "c.yaml")
        node = Node(tmp_path, "serve", *arguments, env=env)
        nodes.append(node)
        return node

    yield start_node
    for node in nodes:
        node.close()


def start_head(start: Start, *arguments: str, config: str | None = None, env: dict[str, str] | None = None) -> Node:
    return start("graph:Main", *LOOPBACK, "--hub-port", "0", *arguments, config=config, env=env)


def hub_address(node: Node) -> str:
    return node.until(r"the hub is at (\S+)").group(1)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=WAIT_S)
    return not alive


def test_a_graph_starts_answers_across_processes_and_leaves_nothing(start: Start) -> None:
    config = "Echo:\n  greeting: hi\n  ServiceArgs:\n    workers: 2\n    envs: {COLOUR: 7}\n"
    node = start_head(start, config=config, env={"STATOR_TOKEN": "a-token-that-nobody-prints"})
    first = node.until(r"\[Main:1\] answer from pid=(\d+): hi you").group(1)
    second = node.until(r"\[Main:1\] answer from pid=(\d+): hi you", times=2).group(1)
    assert first != second
    node.until(r"\[Main:1\] colocated: True")
    node.until(r"\[Echo:2\] echo pid=\d+ greeting=hi env=7")
    node.until("Stator is ready")
    port = int(hub_address(node).rsplit(":", 1)[1])
    children = node.children()
    assert len(children) == 3
    assert all("a-token-that" not in " ".join(c.cmdline()) for c in children)
    assert node.stop() == 0
    assert gone(children)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
    text = node.text
    assert text.index("main drains") < text.index("echo drains") < text.index("echo stops")
    assert "token in the environment: False" in text
    assert "a-token-that" not in text


def test_a_killed_supervisor_takes_its_children_with_it(start: Start) -> None:
    node = start_head(start)
    node.until("Stator is ready")
    children = node.children()
    assert len(children) == 2
    node.signal(signal.SIGKILL)
    assert gone(children)
    assert node.ended() == -signal.SIGKILL


def test_a_second_signal_stops_at_once(start: Start) -> None:
    node = start_head(start, "--Echo.stuck")
    node.until("Stator is ready")
    children = node.children()
    node.signal(signal.SIGTERM)
    node.until("echo drains")
    node.signal(signal.SIGTERM)
    assert node.ended() == 1
    assert gone(children)
    assert "stopping at once" in node.text


def test_what_does_not_drain_is_killed_after_the_grace(start: Start) -> None:
    node = start_head(start, "--Echo.stuck=true", "--grace", "0.5")
    node.until("Stator is ready")
    children = node.children()
    assert node.stop() == 0
    assert gone(children)
    assert "Echo:1 did not stop within 0.5 s" in node.text


def test_a_killed_process_comes_back_with_a_new_identity(start: Start) -> None:
    node = start_head(start)
    pid = int(node.until(r"answer from pid=(\d+): hello you").group(1))
    node.until("Stator is ready")
    os.kill(pid, signal.SIGKILL)
    node.until(r"Echo:1 was ended by SIGKILL.*starting it again in 0.5 s")
    again = int(node.until(r"answer from pid=(\d+): hello you", times=2).group(1))
    assert again != pid
    assert node.stop() == 0


def test_a_process_that_slept_through_its_lease_fences_itself_and_comes_back(start: Start) -> None:
    node = start_head(start)
    pid = int(node.until(r"answer from pid=(\d+): hello you").group(1))
    node.until("Stator is ready")
    os.kill(pid, signal.SIGSTOP)
    node.until("0 instances", times=1 + len([line for line in node.lines if "0 instances" in line]))
    os.kill(pid, signal.SIGCONT)
    node.until(r"Echo:1 exited with code 75; starting it again")
    assert int(node.until(r"answer from pid=(\d+): hello you", times=2).group(1)) != pid
    assert node.stop() == 0
    assert "echo drains" not in node.text[: node.text.index("exited with code 75")]


def test_an_interpreter_that_is_not_there(start: Start) -> None:
    node = start_head(start, "--Echo.ServiceArgs.python=no/such/python")
    assert node.ended() == 2
    assert "Echo:1 cannot be started with no/such/python" in node.lines[-1]


def test_a_head_that_is_not_there_yet_is_waited_for(start: Start, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"STATOR_TOKEN": "shared"}
    early = start("services:Echo", *LOOPBACK, "--join", f"127.0.0.1:{port}", "--Echo.greeting=moin", env=env)
    early.until(f"waiting for the head at 127.0.0.1:{port}")
    head = start("graph:Main", *LOOPBACK, "--hub-port", port, "--Echo.ServiceArgs.workers=0", env=env)
    early.until("joined")
    head.until("answer from pid=.*moin you")
    assert early.stop() == 0
    assert head.stop() == 0


def test_a_process_that_keeps_failing_stops_the_node(start: Start) -> None:
    node = start_head(start, "--Echo.fail=crash")
    assert node.ended() == 1
    delays = re.findall(r"starting it again in (\S+) s", node.text)
    assert delays == ["0.5", "1", "2", "4"]
    assert node.lines[-1] == "Echo:1 failed 5 times in a row"
    assert node.lines[-2] == "stator: Echo:1 exited with code 1: RuntimeError: no engine here"


def test_the_first_error_is_on_top_when_giving_up(start: Start) -> None:
    node = start_head(start, "--Echo.fail=differently")
    assert node.ended() == 1
    assert node.text.count("RuntimeError: the lock is held; starting it again") == 3
    assert node.lines[-2:] == [
        "stator: Echo:1 exited with code 1: RuntimeError: the port is taken",
        "Echo:1 failed 5 times in a row",
    ]


def test_each_process_sees_its_gpus_and_threads(start: Start) -> None:
    flags = ["--Echo.ServiceArgs.resources.gpu=0.5", "--Echo.ServiceArgs.resources.cpu=2"]
    node = start_head(start, *flags, "--Echo.ServiceArgs.workers=3", env={"CUDA_VISIBLE_DEVICES": "5,7"})
    for index, gpu in ((1, 5), (2, 5), (3, 7)):
        node.until(rf"\[Echo:{index}\] sees {{'CUDA_VISIBLE_DEVICES': '{gpu}', 'OMP_NUM_THREADS': '2'}}")
    node.until("Stator is ready")
    assert node.stop() == 0


def test_a_shortage_of_gpus_stops_the_start(start: Start) -> None:
    node = start_head(start, "--Echo.ServiceArgs.resources.gpu=2", env={"CUDA_VISIBLE_DEVICES": "3"})
    assert node.ended() == 2
    assert node.lines[0].startswith("stator: not enough GPUs on this node: 2 asked (Echo:1 2), 1 there (3). Lower")


def bare_environment(path: Path, *packages: str) -> Path:
    """A virtual environment without Stator, which has the named packages of ours."""
    venv.create(path, symlinks=True, with_pip=False)
    (site,) = path.glob("lib/python*/site-packages")
    for name in packages:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        origin = Path(found.origin)
        source = origin.parent if origin.name == "__init__.py" else origin
        (site / source.name).symlink_to(source)
    return path / "bin" / "python"


# What a process needs before the services' own code.
NEEDED = ("msgspec", "uvloop", "xxhash", "ruamel", "psutil")


def test_a_service_runs_in_another_environment_that_lacks_stator(start: Start, tmp_path: Path) -> None:
    python = bare_environment(tmp_path / "other", *(name for name in NEEDED if name != "ruamel"))
    (site,) = (tmp_path / "other").glob("lib/python*/site-packages")
    ruamel = importlib.util.find_spec("ruamel.yaml")
    assert ruamel is not None and ruamel.origin is not None
    (site / "ruamel").mkdir()
    (site / "ruamel" / "yaml").symlink_to(Path(ruamel.origin).parent)
    node = start_head(start, f"--Echo.ServiceArgs.python={python}")
    node.until(rf"\[Echo:1\] runs on {python}")
    node.until("answer from pid=.*hello you")
    node.until("Stator is ready")
    assert node.stop() == 0


def test_an_interpreter_that_does_not_suit_is_refused_by_name(start: Start, tmp_path: Path) -> None:
    python = bare_environment(tmp_path / "bare")
    node = start_head(start, f"--Echo.ServiceArgs.python={python}")
    assert node.ended() == 2
    assert re.search(rf"stator: Echo:1: {python} lacks \w+, which Stator needs: .* -m pip install stator==", node.text)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    (site / "stator").mkdir()
    (site / "stator" / "__init__.py").write_text("__version__ = '0.0.1'")
    node = start_head(start, f"--Echo.ServiceArgs.python={python}")
    assert node.ended() == 2
    assert f"Echo:1: {python} has stator 0.0.1, and this is" in node.text
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\necho \'{"python": [3, 9, 2], "stator": null, "missing": null}\'\n')
    old.chmod(0o755)
    node = start_head(start, f"--Echo.ServiceArgs.python={old}")
    assert node.ended() == 2
    assert f"{old} is Python 3.9.2; Stator needs 3.11 or newer" in node.text


def test_wrong_configuration_found_by_a_service_is_shown_and_not_tried_again(start: Start) -> None:
    node = start_head(start, "--Echo.fail", "config")
    assert node.ended() == 2
    assert node.lines[-1] == "stator: Echo.fail: found config, expected something better"
    assert "starting it again" not in node.text


def test_configuration_errors_are_shown_all_at_once_before_anything_starts(start: Start) -> None:
    config = "Echo:\n  gretting: hi\n  stuck: 7\n  ServiceArgs:\n    workers: many\n"
    node = start_head(start, "--Ecko.x=1", config=config)
    assert node.ended() == 2
    assert node.text == (
        "stator: --Ecko.x=1: there is no service Ecko (did you mean Echo?); known: Common, Echo, Frontend, Helper, "
        "Main, PrefillWorker, Processor, Router, VllmWorker"
    )
    node = start_head(start, config=config)
    assert node.ended() == 2
    assert node.lines == [
        'stator: c.yaml:5: Echo.ServiceArgs.workers: found "many", expected a whole number, at least 0, at most 1024',
        "c.yaml:2: Echo.gretting: unknown key (did you mean greeting?); known: greeting, fail, stuck",
        "c.yaml:3: Echo.stuck: found 7, expected true or false",
    ]


def test_flags_are_merged_into_the_file(start: Start) -> None:
    config = "Echo:\n  greeting: hi\n  ServiceArgs:\n    workers: 2\n    envs: {COLOUR: red}\n"
    node = start_head(start, "--Echo.ServiceArgs.workers=1", "--Echo.greeting", "good day", config=config)
    node.until(r"\[Echo:1\] echo pid=\d+ greeting=good day env=red")
    node.until("Stator is ready")
    assert len(node.children()) == 2
    assert node.stop() == 0


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "Give --join HEAD:7440 .* or set NATS_SERVER and ETCD_ENDPOINTS"),
        ({"NATS_SERVER": "nats://h:4222"}, "NATS_SERVER is set, but ETCD_ENDPOINTS is not"),
        ({"ETCD_ENDPOINTS": "http://h:2379"}, "ETCD_ENDPOINTS is set, but NATS_SERVER is not"),
        ({"NATS_SERVER": "nats://h:4222", "ETCD_ENDPOINTS": "ftp://h"}, "expected http://HOST:PORT"),
    ],
)
def test_a_component_without_control_plane_refuses(start: Start, env: dict[str, str], expected: str) -> None:
    node = start("services:Echo", env=env)
    assert node.ended() == 2
    assert re.search(expected, node.text)
    if not env:
        assert "Echo is a component target" in node.text


def test_another_node_joins_and_leaves(start: Start) -> None:
    head = start_head(start)
    head.until("answer from pid=")
    command = head.until(r"stator (serve services:Echo --join 127\.0\.0\.1:\d+)$").group(1)
    joined = start(*command.split()[1:], *LOOPBACK, "--Echo.greeting=moin")
    joined.until("joined 127.0.0.1:")
    head.until("answer from pid=.*moin you")
    assert joined.stop() == 0
    assert head.process.poll() is None
    assert head.stop() == 0


def test_joining_needs_the_token(start: Start, tmp_path: Path) -> None:
    head = start_head(start)
    address = hub_address(head)
    elsewhere = {"XDG_STATE_HOME": str(tmp_path / "elsewhere")}
    without = start("services:Echo", *LOOPBACK, "--join", address, env=elsewhere)
    assert without.ended() == 2
    assert re.search("needs the deployment's token.*stator.token", without.text)
    wrong = start("services:Echo", *LOOPBACK, "--join", address, env={"STATOR_TOKEN": "wrong"})
    assert wrong.ended() == 2
    assert re.search(f"the head at {address} refused this node: .*token", wrong.text)
    other = start("services:Echo", *LOOPBACK, "--join", address, "--namespace", "other", env={"STATOR_TOKEN": "wrong"})
    assert other.ended() == 2
    assert re.search("namespace", other.text)
    assert head.stop() == 0


def test_a_node_outlives_its_head_and_joins_the_next(start: Start) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    head = start("graph:Main", *LOOPBACK, "--hub-port", port)
    head.until("Stator is ready")
    joined = start("services:Echo", *LOOPBACK, "--join", f"127.0.0.1:{port}", "--Echo.greeting=moin")
    joined.until("joined 127.0.0.1:")
    assert head.stop() == 0
    again = start("graph:Main", *LOOPBACK, "--hub-port", port, "--Echo.ServiceArgs.workers=0")
    again.until("answer from pid=.*moin you")
    assert joined.stop() == 0
    assert again.stop() == 0


def test_two_heads_on_one_port(start: Start) -> None:
    head = start_head(start)
    address = hub_address(head)
    second = start("graph:Main", *LOOPBACK, "--hub-port", address.rsplit(":", 1)[1])
    assert second.ended() == 2
    assert "in use" in second.text and "--hub-port" in second.text
    assert head.stop() == 0
