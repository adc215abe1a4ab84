"""What only NATS has: ways to be let in, TLS, files that outlive it, a cluster, snapshots. Against real servers."""

import asyncio
import base64
import contextlib
import json
import logging
import random
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import nkeys
import pytest
from nacl.signing import SigningKey

from stator.config.external import NatsSettings, TlsFiles
from stator.core.job_queue_events import QueueLimits, QueueSize
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.errors import ErrorCode
from stator.ids import InstanceId, JobId, LeaseId
from stator.queue import nats as nats_queue
from stator.queue import nats_log
from stator.queue.base import Delivery, QueueLoss
from stator.queue.nats import NatsQueue
from stator.queue.nats_connection import NatsConnection
from stator.testing.certificates import make_certificates
from stator.testing.contracts.discovery import Reading, expect_error
from stator.testing.real_servers import NatsServer, free_port

pytestmark = [pytest.mark.servers, pytest.mark.timeout(120)]

LIMITS = QueueLimits(ack_wait_s=3.0, steal_after_s=0.3, max_waiting=2_000, max_dead_letters=4)


class Leases(MemoryDiscovery):
    """Leases in this process, as a queue finds them."""

    def find_lease(self, lease_id: LeaseId) -> Any:
        return self._leases.get(lease_id)


class Member:
    """A process that puts and pulls, with a lease of its own."""

    def __init__(self, store: MemoryKeyStore, settings: NatsSettings, *, timeout_s: float, replicas: int) -> None:
        limits = LIMITS if replicas == 1 else replace(LIMITS, ack_wait_s=60.0)
        self.discovery = Leases(store)
        self.connection = NatsConnection(settings, timeout_s=timeout_s, random_source=random.Random(3))
        self.queue = NatsQueue(
            self.connection, self.discovery, namespace="a.b", name="prefill/kind", timeout_s=timeout_s,
            limits=limits, replicas=replicas,
        )  # fmt: skip
        self.lease_id = LeaseId(0)

    async def put(self, *jobs: str, payload: bytes | None = None) -> None:
        for job in jobs:
            await self.queue.put(JobId(job), job.encode() if payload is None else payload)

    async def pull(self, max_jobs: int = 1, wait_s: float = 5.0) -> list[Delivery]:
        return await self.queue.pull(InstanceId("worker"), self.lease_id, max_jobs=max_jobs, wait_s=wait_s)

    async def api(self, call: str, body: Any = None) -> Any:
        return msgspec.json.decode(await self.connection.api(call, body, msgspec.Raw))

    async def streams(self) -> dict[str, int]:
        """Messages in each stream, by the last part of its name."""
        found = await self.api("STREAM.LIST", {})
        return {s["config"]["name"].rpartition("-")[2]: s["state"]["messages"] for s in found["streams"]}

    async def close(self) -> None:
        await self.queue.close()
        await self.connection.close()
        await self.discovery.close()


@contextlib.asynccontextmanager
async def members(*settings: NatsSettings, timeout_s: float = 3.0, replicas: int = 1) -> AsyncGenerator[list[Member]]:
    store = MemoryKeyStore()
    made = [Member(store, each, timeout_s=timeout_s, replicas=replicas) for each in settings]
    try:
        for member in made:
            member.lease_id = (await member.discovery.grant_lease()).lease_id
        yield made
    finally:
        for member in made:
            await member.close()
        store.close()


@contextlib.asynccontextmanager
async def started(*servers: NatsServer) -> AsyncGenerator[None]:
    try:
        await asyncio.gather(*(server.start() for server in servers))
        yield
    finally:
        for server in servers:
            await server.kill()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await scene()

    asyncio.run(bounded())


async def one_job_goes_round(member: Member, job: str = "j") -> None:
    await member.put(job)
    (delivery,) = await member.pull()
    assert delivery.payload == job.encode()
    assert await member.queue.ack(delivery.job_id, delivery.attempt)


def seed_file(directory: Path, name: str, prefix: int) -> tuple[Path, str]:
    """A new nkey: the file with its seed, and its public key."""
    raw = bytes(SigningKey.generate())
    seed = nkeys.encode_seed(raw, prefix)
    path = directory / f"{name}.nk"
    path.write_bytes(seed)
    path.chmod(0o600)
    return path, nkeys.from_seed(bytearray(seed)).public_key.decode()


def jwt(subject: str, issuer_seed: Path, issuer: str, name: str, nats: dict[str, Any]) -> str:
    """As `nsc` makes it."""

    def encode(part: Any) -> str:
        data = part if isinstance(part, bytes) else json.dumps(part, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    claims = {"jti": name, "iat": 1_700_000_000, "iss": issuer, "name": name, "sub": subject, "nats": nats}
    signed = f"{encode({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{encode(claims)}"
    key = nkeys.from_seed(bytearray(issuer_seed.read_bytes()))
    return f"{signed}.{encode(bytes(key.sign(signed.encode())))}"


def operator_mode(directory: Path) -> tuple[str, Path]:
    """A server's configuration with an operator, an account and its resolver; and a user's credentials file."""
    operator_seed, operator = seed_file(directory, "operator", nkeys.PREFIX_BYTE_OPERATOR)
    account_seed, account = seed_file(directory, "account", nkeys.PREFIX_BYTE_ACCOUNT)
    user_seed, user = seed_file(directory, "user", nkeys.PREFIX_BYTE_USER)
    unlimited = {"subs": -1, "data": -1, "payload": -1}
    limits = {**unlimited, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    limits |= {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    operator_jwt = jwt(operator, operator_seed, operator, "O", {"type": "operator", "version": 2})
    _, system = seed_file(directory, "system", nkeys.PREFIX_BYTE_ACCOUNT)
    of_account = {"type": "account", "version": 2, "limits": limits, "default_permissions": {"pub": {}, "sub": {}}}
    account_jwt = jwt(account, operator_seed, operator, "A", of_account)
    of_system = {"type": "account", "version": 2, "limits": {**limits, "mem_storage": 0, "disk_storage": 0}}
    system_jwt = jwt(system, operator_seed, operator, "SYS", of_system)
    user_jwt = jwt(user, account_seed, account, "U", {"type": "user", "version": 2, "pub": {}, "sub": {}, **unlimited})
    credentials = directory / "user.creds"
    credentials.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user_seed.read_text()}\n------END USER NKEY SEED------\n"
    )
    preload = f"{{ {account}: {account_jwt}, {system}: {system_jwt} }}"
    config = f"operator: {operator_jwt}\nsystem_account: {system}\nresolver: MEMORY\nresolver_preload: {preload}"
    return config, credentials


@pytest.mark.parametrize("way", ["user", "token", "nkey", "credentials"])
def test_ways_to_be_let_in(tmp_path: Path, way: str) -> None:
    async def scene() -> None:
        fields: dict[str, Any]
        if way == "user":
            config, fields = "authorization { user: u, password: right }", {"user": "u", "password": "right"}
            wrong = {"user": "u", "password": "guessed"}
        elif way == "token":
            config, fields, wrong = 'authorization { token: "right" }', {"token": "right"}, {"token": "guessed"}
        elif way == "nkey":
            path, public = seed_file(tmp_path, "user", nkeys.PREFIX_BYTE_USER)
            other, _ = seed_file(tmp_path, "other", nkeys.PREFIX_BYTE_USER)
            config = f"authorization {{ users: [ {{ nkey: {public} }} ] }}"
            fields, wrong = {"nkey_file": str(path)}, {"nkey_file": str(other)}
        else:
            config, path = operator_mode(tmp_path)
            fields, wrong = {"credentials_file": str(path)}, {}
        server = NatsServer(tmp_path / "nats", config=config)
        async with started(server):
            right = NatsSettings((server.address,), **fields)
            async with members(right, NatsSettings((server.address,), **wrong)) as (member, refused):
                await one_job_goes_round(member)
                error = await expect_error(ErrorCode.UNAUTHORIZED, refused.put("k"))
                assert server.address in error.message
                assert "NATS_AUTH_" in error.message
                assert "guessed" not in error.message

    run(scene)


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    async def scene() -> None:
        files = make_certificates(tmp_path / "certs")
        config = (
            f'tls {{ cert_file: "{files.server_cert}", key_file: "{files.server_key}", ca_file: "{files.ca}", '
            f"verify: true }}"
        )
        server = NatsServer(tmp_path / "nats", config=config)
        async with started(server):
            address = server.address.replace("nats://", "tls://")
            right = NatsSettings((address,), tls=TlsFiles(files.ca, files.client_cert, files.client_key))
            for number, tls in enumerate((TlsFiles(files.ca), TlsFiles())):
                settings = NatsSettings((address,), tls=tls)
                async with members(right, settings, timeout_s=1.5) as (member, refused):
                    await one_job_goes_round(member, f"j{number}")
                    error = await expect_error(ErrorCode.INSTANCE_LOST, refused.put("k"))
                    assert address in error.message

    run(scene)


def test_a_server_without_jetstream_is_told_what_to_set(tmp_path: Path) -> None:
    class Plain(NatsServer):
        def command(self) -> list[str]:
            return ["nats-server", "-a", "127.0.0.1", "-p", str(self.port)]

    async def scene() -> None:
        server = Plain(tmp_path)
        async with started(server), members(NatsSettings((server.address,))) as (member,):
            error = await expect_error(ErrorCode.PROTOCOL, member.connection.api("INFO", None, dict))
            assert "-js" in error.message
            error = await expect_error(ErrorCode.INSTANCE_LOST, member.put("j"))
            assert server.address in error.message

    run(scene)


def test_jobs_outlive_a_restart_of_the_server(tmp_path: Path) -> None:
    async def scene() -> None:
        server = NatsServer(tmp_path)
        settings = NatsSettings((server.address,))
        async with started(server), members(settings, settings) as (one, two):
            await one.put("1", "2", "3")
            (held,) = await one.pull()
            async with Reading(two.queue.watch_size()) as news:
                assert await news.next() == QueueSize(2, 1)
                for how in (signal.SIGTERM, signal.SIGKILL):
                    await server.kill(how)
                    assert await news.next() == QueueLoss(jobs_lost=False)
                    await server.start()
                    assert await news.next(10) == QueueSize(2, 1)
            assert await one.queue.extend(held.job_id, held.attempt)
            assert await one.queue.ack(held.job_id, held.attempt)
            assert [(d.job_id, d.payload) for d in await two.pull(5)] == [("2", b"2"), ("3", b"3")]

    run(scene)


def test_streams_that_were_deleted_are_made_again(tmp_path: Path) -> None:
    async def scene() -> None:
        server = NatsServer(tmp_path)
        settings = NatsSettings((server.address,))
        async with started(server), members(settings, settings) as (one, two):
            await one.put("1")
            async with Reading(two.queue.watch_size()) as news:
                assert await news.next() == QueueSize(1, 0)
                for stream in (await one.api("STREAM.NAMES", {}))["streams"]:
                    await one.api(f"STREAM.DELETE.{stream}")
                await one.put("2")
                seen = [await news.next(10)]
                while seen[-1] != QueueSize(1, 0):
                    seen.append(await news.next(10))
                assert QueueLoss(jobs_lost=True) in seen
            assert [d.job_id for d in await two.pull(5)] == ["2"]

    run(scene)


def test_a_snapshot_shortens_the_log_and_new_members_begin_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_queue, "SNAPSHOT_EVERY", 30)

    async def scene() -> None:
        server = NatsServer(tmp_path)
        settings = NatsSettings((server.address,))
        async with started(server), members(settings, settings) as (one, late):
            await one.put(*(f"j{number}" for number in range(60)))
            for delivery in await one.pull(20):
                assert await one.queue.ack(delivery.job_id, delivery.attempt)
            (held,) = await one.pull()
            async with asyncio.timeout(20):
                # Written while the log goes on; the events before the one before last are deleted then.
                number = 0
                while (streams := await one.streams())["LOG"] > 70 or streams["SNAP"] < 2:
                    copy = one.queue._copy
                    assert copy is not None
                    if copy.sequence - copy.snapshot_sequence >= 30:
                        continue  # One is due: what came on top of it would be kept.
                    number += 1
                    await one.put(f"more{number}")
                    await one.queue.cancel(JobId(f"more{number}"))
                    assert await one.queue.extend(held.job_id, held.attempt)
            assert await late.queue.size() == QueueSize(39, 1)
            info = await one.api("STREAM.LIST", {})
            first = [s["state"]["first_seq"] for s in info["streams"] if s["config"]["name"].endswith("LOG")]
            assert first[0] > 1
            assert not await late.queue.ack(held.job_id, held.attempt + 1)
            assert await late.queue.ack(held.job_id, held.attempt)
            pulled = await late.pull(50)
            assert [d.job_id for d in pulled] == [f"j{number}" for number in range(21, 60)]
            assert [d.payload for d in pulled] == [f"j{number}".encode() for number in range(21, 60)]
            # Nothing of the jobs that are done is kept.
            for delivery in pulled:
                assert await late.queue.ack(delivery.job_id, delivery.attempt)
            async with asyncio.timeout(10):
                while (await one.streams())["BODY"] > 0:
                    await one.queue.size()

    run(scene)


def test_a_head_of_snapshots_that_cannot_be_read_does_not_keep_new_members_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        server = NatsServer(tmp_path)
        settings = NatsSettings((server.address,))
        async with started(server), members(settings, settings) as (one, late):
            await one.put("kept")
            names = nats_log.LogNames("a.b", "prefill/kind", LIMITS)
            for head in (b"garbage", b'{"created": "\x80"}'):
                await one.connection.request(f"{names.subject}.snap.head", head, timeout_s=3.0)
            assert [delivery.job_id for delivery in await late.pull()] == ["kept"]

    with caplog.at_level(logging.ERROR):
        run(scene)
    assert "what says where the snapshot of" in caplog.text


def test_payloads_larger_than_a_message(tmp_path: Path) -> None:
    async def scene() -> None:
        server = NatsServer(tmp_path)
        settings = NatsSettings((server.address,))
        async with started(server), members(settings, settings) as (one, two):
            payload = random.Random(5).randbytes(3_000_000)
            await one.put("large", payload=payload)
            await one.put("empty", payload=b"")
            large, empty = await two.pull(2)
            assert large.payload == payload
            assert empty.payload == b""
            assert nats_log.LogNames("a.b", "prefill/kind", LIMITS).log in str(await one.api("STREAM.NAMES", {}))

    run(scene)


def test_a_cluster_loses_a_server(tmp_path: Path) -> None:
    async def scene() -> None:
        ports = [free_port() for _ in range(3)]
        routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
        servers = [
            NatsServer(
                tmp_path / f"n{number}",
                config=f"server_name: n{number}\n"
                f"cluster {{ name: c, host: 127.0.0.1, port: {port}, routes: [{routes}] }}",
            )
            for number, port in enumerate(ports)
        ]
        addresses = tuple(server.address for server in servers)
        settings = NatsSettings(addresses)
        # A new leader takes JetStream some ten seconds.
        async with started(*servers), members(settings, settings, timeout_s=40.0, replicas=3) as (one, two):
            await one.put("0")
            await servers[0].kill()
            await one.put("1")
            for job in ("0", "1"):
                (delivery,) = await two.pull(1, wait_s=10.0)
                assert (delivery.job_id, delivery.payload) == (job, job.encode())
                assert await two.queue.ack(delivery.job_id, delivery.attempt)
            await servers[0].start()
            assert await two.queue.size() == QueueSize(0, 0)

    run(scene)
