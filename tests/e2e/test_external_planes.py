"""The demo graph on real etcd and NATS: the text is the reference's, nodes find each other without a hub."""

import asyncio
import itertools
import json
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from metrics import parse, total
from processes import Serve, free_port
from prompts import PROMPTS
from reference import Reference

from stator.config.external import EtcdSettings
from stator.discovery.etcd import EtcdDiscovery
from stator.testing.real_servers import EtcdServer, NatsServer

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

NAMESPACE = "external"
PASSWORD = "not-for-anybodys-eyes"


def chat(port: int, content: list[dict[str, str]], max_tokens: int = 40) -> str:
    body = {"model": "tiny-llama", "messages": content, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["choices"][0]["message"]["content"]


async def remote_prefills_grow(port: int) -> None:
    """Prompts that no cache has are prefilled elsewhere, through the queue; NATS may just have come back."""

    def count() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            samples = parse(response.read().decode())
        return total(samples, "stator_remote_prefill_total", role="decode", outcome="remote")

    before = await asyncio.to_thread(count)
    async with asyncio.timeout(60):
        for number in itertools.count():
            text = f"Number {before} {number}. " + "And God saw the light, that it was good. " * 8
            await asyncio.to_thread(chat, port, [{"role": "user", "content": text}], 4)
            if await asyncio.to_thread(count) > before:
                return


def run(directory: Path, scene: Callable[[EtcdServer, NatsServer], Awaitable[None]]) -> None:
    async def with_servers() -> None:
        etcd = EtcdServer(directory / "etcd")
        nats = NatsServer(directory / "nats", config=f'authorization {{ user: stator, password: "{PASSWORD}" }}')
        try:
            await asyncio.gather(etcd.start(), nats.start())
            await scene(etcd, nats)
        finally:
            await asyncio.gather(etcd.kill(), nats.kill())

    asyncio.run(with_servers())


def test_the_demo_graph_on_etcd_and_nats(tmp_path: Path) -> None:
    port = free_port()
    started: list[Serve] = []

    async def scene(etcd: EtcdServer, nats: NatsServer) -> None:
        env = {
            "NATS_SERVER": f"nats://stator:{PASSWORD}@127.0.0.1:{nats.port}",
            "ETCD_ENDPOINTS": etcd.address,
            "STATOR_TOKEN": "",
        }

        def serve(number: int, target: str, *flags: str) -> Serve:
            common = ["-f", "configs/tiny.yaml", "--host", "127.0.0.1", "--namespace", NAMESPACE]
            # Each node has a state directory of its own: nothing but the services tells them of each other.
            node = Serve(["serve", target, *common, *flags], state_dir=tmp_path / f"state-{number}", env=env)
            started.append(node)
            return node

        head = await asyncio.to_thread(serve, 1, "graphs.disagg_router:Frontend", f"--Frontend.port={port}")
        await asyncio.to_thread(head.wait_for, "Stator is ready", 120)
        prefill = await asyncio.to_thread(serve, 2, "components.prefill_worker:PrefillWorker")
        await asyncio.to_thread(prefill.wait_for, "joined etcd at", 120)
        reference = Reference()
        for messages in PROMPTS:
            text = await asyncio.to_thread(chat, port, messages)
            assert text == reference.chat(messages, 40).text
        await remote_prefills_grow(port)
        await check_store(etcd)
        assert "hub is at" not in head.output
        head.wait_for(rf"export NATS_SERVER=nats://127.0.0.1:{nats.port} ETCD_ENDPOINTS=http://127.0.0.1:{etcd.port}")
        head.wait_for("stator serve components.prefill_worker:PrefillWorker .*--namespace external")
        assert all(PASSWORD not in node.output for node in started)
        # A restart of both, with what they had: serving goes on, and so does the queue.
        await asyncio.gather(etcd.kill(), nats.kill())
        assert await asyncio.to_thread(chat, port, PROMPTS[0]) == reference.chat(PROMPTS[0], 40).text
        await asyncio.gather(etcd.start(), nats.start())
        await remote_prefills_grow(port)
        assert await asyncio.to_thread(prefill.stop) == 0
        assert await asyncio.to_thread(head.stop) == 0

    try:
        run(tmp_path, scene)
    finally:
        for node in started:
            if node.process.poll() is None:
                node.kill_tree()


async def check_store(etcd: EtcdServer) -> None:
    discovery = EtcdDiscovery(EtcdSettings((etcd.address,)), namespace=NAMESPACE)
    try:
        assert await discovery.get("token") is not None
        services = {entry.key.split("/")[1] for entry in await discovery.get_prefix("instances/")}
        assert {"Frontend", "VllmWorker", "PrefillWorker"} <= services
    finally:
        await discovery.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"NATS_SERVER": "nats://stator:wrong@127.0.0.1:{nats}"}, r"NATS at .* does not let us in.*NATS_AUTH_"),
        ({"ETCD_ENDPOINTS": "http://127.0.0.1:{nats}"}, "waiting for etcd: "),
    ],
)
def test_services_that_refuse_are_named_at_the_start(tmp_path: Path, change: dict[str, str], says: str) -> None:
    async def scene(etcd: EtcdServer, nats: NatsServer) -> None:
        env = {"NATS_SERVER": f"nats://stator:{PASSWORD}@127.0.0.1:{nats.port}", "ETCD_ENDPOINTS": etcd.address}
        env |= {name: value.format(nats=nats.port) for name, value in change.items()}
        target = ["serve", "components.prefill_worker:PrefillWorker", "-f", "configs/tiny.yaml"]
        node = Serve(target, state_dir=tmp_path / "state", env=env)
        try:
            await asyncio.to_thread(node.wait_for, says, 60)
            assert "wrong" not in node.output
            assert PASSWORD not in node.output
        finally:
            node.kill_tree()

    run(tmp_path, scene)
