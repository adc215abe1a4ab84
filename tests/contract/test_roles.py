"""deploy/secure on the real servers: each role can do what its nodes do, and not what another's do."""

import asyncio
import contextlib
import os
import random
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from stator.config.external import EtcdSettings, NatsSettings
from stator.core.job_queue_events import QueueLimits, QueueSize
from stator.core.replicated_queue import Body, Entry, LoggedAck, LoggedPut
from stator.core.settings import SETTINGS
from stator.discovery.etcd import EtcdDiscovery
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import ErrorCode, StatorError
from stator.hub.client import Backoff
from stator.ids import InstanceId, JobId
from stator.queue import nats as nats_queue
from stator.queue import nats_log
from stator.queue.nats import NatsQueue
from stator.queue.nats_connection import JetStreamError, NatsConnection
from stator.queue.nats_log import LogNames
from stator.testing.real_servers import EtcdServer, NatsServer

pytestmark = pytest.mark.servers

SECURE = Path(__file__).resolve().parents[2] / "deploy" / "secure"
ROLES = ("head", "decode", "prefill", "operator")
NAMESPACE = "stator"
TIMEOUT_S = 2.0


WITHOUT_ETCDCTL = pytest.mark.skipif(
    shutil.which("etcdctl") is None and not os.environ.get("STATOR_REQUIRE_SERVERS"),
    reason="needs etcdctl: apt-get install -y etcd-client",
)


def password(role: str) -> str:
    return f"{role}-password"


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(50):
            await scene()

    asyncio.run(bounded())


async def etcd_with_roles(directory: Path) -> EtcdServer:
    server = EtcdServer(directory / "etcd")
    await server.start()
    passwords = {f"{role.upper()}_PASSWORD": password(role) for role in (*ROLES, "root")}
    done = await asyncio.to_thread(
        subprocess.run,
        [SECURE / "etcd-roles.sh"],
        env={**os.environ, "ETCDCTL_ENDPOINTS": server.address, "STATOR_NAMESPACE": NAMESPACE, **passwords},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return server


def discovery(server: EtcdServer, role: str) -> EtcdDiscovery:
    settings = EtcdSettings((server.address,), user=role, password=password(role))
    return EtcdDiscovery(settings, namespace=NAMESPACE, timeout_s=TIMEOUT_S)


@WITHOUT_ETCDCTL
def test_each_role_writes_its_own_keys_in_etcd_and_reads_all(tmp_path: Path) -> None:
    writes = {
        "head": ["instances/Frontend/a", "instances/Processor/a", "instances/Router/a"],
        "decode": ["instances/VllmWorker/a"],
        "prefill": ["instances/PrefillWorker/a", "queue-consumers/a"],
        "operator": [SETTINGS["router-mode"].key],
    }

    async def scene() -> None:
        server = await etcd_with_roles(tmp_path)
        members = {role: discovery(server, role) for role in ROLES}
        try:
            for role, keys in writes.items():
                lease = await members[role].grant_lease(ttl_s=5.0)
                for key in keys:
                    await members[role].put(key, role.encode(), None if role == "operator" else lease)
                for key in (key for other, keys in writes.items() if other != role for key in keys):
                    with pytest.raises(StatorError) as refused:
                        await members[role].put(key, b"not mine")
                    assert refused.value.code is ErrorCode.UNAUTHORIZED, refused.value
            for role in ROLES:
                found = await members[role].get_prefix("instances/")
                assert len(found) == 5 and all(entry.value != b"not mine" for entry in found)
            stranger = EtcdDiscovery(EtcdSettings((server.address,)), namespace=NAMESPACE, timeout_s=TIMEOUT_S)
            with pytest.raises(StatorError):
                await stranger.get_prefix("instances/")
            await stranger.close()
        finally:
            for member in members.values():
                await member.close()
            await server.kill()

    run(scene)


def nats_with_roles(directory: Path) -> NatsServer:
    """The shipped file, but for what a test's own server has of its own: its name, port and store."""
    text = (SECURE / "nats.conf").read_text()
    for line in (r"server_name: .*", r"host: .*", r"port: .*", r"http: .*"):
        text, count = re.subn(rf"(?m)^{line}$", "", text)
        assert count == 1, line
    text, count = re.subn(r"(?ms)^jetstream \{.*?^\}$", "", text)
    assert count == 1
    return NatsServer(directory / "nats", config=text)


async def opened_queue(nats: NatsServer, role: str, namespace: str = NAMESPACE) -> tuple[NatsConnection, NatsQueue]:
    settings = NatsSettings((nats.address,), user=role, password=password(role))
    connection = NatsConnection(settings, timeout_s=TIMEOUT_S, random_source=random.Random())
    leases = MemoryDiscovery(MemoryKeyStore())
    return connection, NatsQueue(connection, leases, namespace=namespace, timeout_s=TIMEOUT_S)


@contextlib.asynccontextmanager
async def prefill_and_decode(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[tuple[NatsConnection, NatsQueue]]]:
    """A queue as each of the two has it, on a server with the shipped roles where nobody has been before."""
    for role in ROLES:
        monkeypatch.setenv(f"STATOR_NATS_{role.upper()}_PASSWORD", password(role))
    nats = nats_with_roles(directory)
    await nats.start()
    opened = [await opened_queue(nats, role) for role in ("prefill", "decode")]
    try:
        yield opened
    finally:
        for connection, made in opened:
            await made.close()
            await connection.close()
        await nats.kill()


def test_streams_and_snapshots_are_the_decode_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill node that is first waits for them; at its turn to write a snapshot it leaves that to others."""
    monkeypatch.setattr(nats_queue, "SNAPSHOT_EVERY", 10)

    async def scene() -> None:
        async with prefill_and_decode(tmp_path, monkeypatch) as ((_, prefill), (connection, decode)):
            with pytest.raises(StatorError):
                await prefill.size()
            await decode.put(JobId("first"), b"")
            assert (await prefill.size()).waiting == 1
            # Only who is not let write them is asked for a while.
            monkeypatch.setattr(decode, "_may_write_snapshots", False)
            while prefill._may_write_snapshots:
                await prefill.size()
            monkeypatch.undo()
            monkeypatch.setattr(nats_queue, "SNAPSHOT_EVERY", 10)
            names = LogNames(NAMESPACE, "prefill", QueueLimits())
            head = {"last_by_subj": f"{names.subject}.snap.head"}
            while True:
                await decode.size()
                with contextlib.suppress(JetStreamError):
                    await connection.api(f"STREAM.MSG.GET.{names.snap}", head, dict)
                    break
            assert (await prefill.size()).waiting == 1

    run(scene)


def test_who_asks_a_log_that_is_there_by_now_need_not_wait_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Patient(Backoff):
        def next_s(self) -> float:
            return 60.0

    async def scene() -> None:
        async with prefill_and_decode(tmp_path, monkeypatch) as ((_, prefill), (_, decode)):
            with monkeypatch.context() as patched, pytest.raises(StatorError):
                patched.setattr(nats_log, "Backoff", Patient)
                await prefill.size()
            await decode.put(JobId("first"), b"")
            assert (await prefill.size()).waiting == 1

    run(scene)


def test_who_puts_jobs_and_who_takes_them_in_nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        for role in ROLES:
            monkeypatch.setenv(f"STATOR_NATS_{role.upper()}_PASSWORD", password(role))
        # Leases and consumers are in etcd, which asks nobody here.
        etcd, nats = EtcdServer(tmp_path / "etcd"), nats_with_roles(tmp_path)
        await asyncio.gather(etcd.start(), nats.start())
        opened: list[tuple[EtcdDiscovery, NatsConnection, NatsQueue]] = []

        def queue(role: str, given: str | None = None) -> NatsQueue:
            settings = NatsSettings((nats.address,), user=role, password=given or password(role))
            connection = NatsConnection(settings, timeout_s=TIMEOUT_S, random_source=random.Random())
            found = EtcdDiscovery(EtcdSettings((etcd.address,)), namespace=NAMESPACE, timeout_s=TIMEOUT_S)
            made = NatsQueue(connection, found, namespace=NAMESPACE, timeout_s=TIMEOUT_S, random_source=random.Random())
            opened.append((found, connection, made))
            return made

        try:
            decode, prefill, operator = queue("decode"), queue("prefill"), queue("operator")
            large = bytes(3_000_000)
            await decode.put(JobId("small"), b"payload")
            await decode.put(JobId("large"), large)
            lease = await opened[1][0].grant_lease()
            taken: dict[str, bytes] = {}
            for _ in range(2):
                [job] = await prefill.pull(InstanceId("p"), lease.lease_id, max_jobs=1, wait_s=10.0)
                taken[job.job_id] = job.payload
                assert await prefill.extend(job.job_id, job.attempt)
                assert await prefill.ack(job.job_id, job.attempt)
            assert taken == {"small": b"payload", "large": large}
            size = await operator.size()
            assert (size.waiting, size.in_flight) == (0, 0)
            await decode.put(JobId("cancelled"), b"")
            assert await decode.cancel(JobId("cancelled"))
            for role in ("prefill", "operator", "head"):
                with pytest.raises(StatorError):
                    await queue(role).put(JobId(f"of {role}"), b"")
            with pytest.raises(StatorError, match="does not let us in"):
                await queue("decode", "guessed").put(JobId("of a stranger"), b"")
            assert (await decode.size()).waiting == 0
            # By hand, where a prefill node may write: a job, and what is no entry at all.
            names = LogNames(NAMESPACE, "prefill", QueueLimits())
            where, by_hand = f"{names.subject}.log.event", opened[1][1]
            forged = Entry("somebody", 1, LoggedPut(JobId("forged"), Body("b", 1)))
            for data in (msgspec.msgpack.encode(forged), b"\xc1garbage", b"\x93\xa1\x80\x01\x81"):
                await by_hand.request(where, data, timeout_s=TIMEOUT_S)
            assert [await member.size() for member in (decode, prefill, operator)] == [QueueSize(0, 0)] * 3
            # What a role may not do is said at once, and by name.
            for member, event in ((operator, LoggedAck(JobId("a"), 1)), (prefill, LoggedPut(JobId("a"), Body("b", 1)))):
                with pytest.raises(StatorError, match="does not let our user publish on") as refused:
                    await member._ask(event)
                assert refused.value.code is ErrorCode.UNAUTHORIZED
        finally:
            for found, connection, made in opened:
                await made.close()
                await connection.close()
                await found.close()
            await asyncio.gather(etcd.kill(), nats.kill())

    run(scene)
