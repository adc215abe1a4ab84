"""What only etcd has: members, compaction, users, TLS, its gateway. Against real servers."""

import asyncio
import base64
import contextlib
import itertools
import random
import shutil
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from stator.config.external import EtcdSettings, TlsFiles
from stator.discovery.base import WatchBatch
from stator.discovery.etcd import EtcdDiscovery
from stator.errors import ErrorCode
from stator.runtime.context import loop_time
from stator.testing.certificates import make_certificates
from stator.testing.contracts.discovery import PATIENCE_S, Reading, expect_error, fold
from stator.testing.real_servers import EtcdServer, free_port

pytestmark = pytest.mark.servers

TTL_S = 2.0


@contextlib.asynccontextmanager
async def connected(*addresses: str, **settings: Any) -> AsyncGenerator[EtcdDiscovery]:
    found = EtcdSettings(tuple(addresses), **settings)
    discovery = EtcdDiscovery(
        found, namespace="test", timeout_s=3.0, random_source=random.Random(1), return_window_s=0.2,
        grace_s=TTL_S + 0.2, probe_s=0.5,
    )  # fmt: skip
    try:
        yield discovery
    finally:
        await discovery.close()


@contextlib.asynccontextmanager
async def started(*servers: EtcdServer) -> AsyncGenerator[None]:
    """All of them, which may need each other for it."""
    try:
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.start())
        yield
    finally:
        for server in servers:
            await server.kill()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(50):
            await scene()

    asyncio.run(bounded())


async def admin(address: str, path: str, body: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """What an operator does by other means."""
    async with aiohttp.ClientSession() as session, session.post(address + path, json=body, **kwargs) as response:
        answer = await response.json(content_type=None)
        assert response.status == 200, answer
        return answer


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


async def until(reading: Reading[WatchBatch], view: dict[str, bytes], expected: dict[str, bytes]) -> list[WatchBatch]:
    """The batches that lead from view to expected."""
    batches: list[WatchBatch] = []
    while view != expected:
        batches.append(await reading.next(2 * PATIENCE_S))
        view = fold(view, batches[-1])
    return batches


def test_keys_are_below_the_namespace(tmp_path: Path) -> None:
    async def scene() -> None:
        server = EtcdServer(tmp_path)
        async with started(server), connected(server.address) as mine:
            lease = await mine.grant_lease(TTL_S)
            await mine.put("instances/a", b"x", lease)
            await mine.put("ünïcode", b"\x00\xff")
            body = {"key": b64("/stator/test/"), "range_end": b64("/stator/test0"), "keys_only": True}
            found = await admin(server.address, "/v3/kv/range", body)
            names = [base64.b64decode(kv["key"]).decode() for kv in found["kvs"]]
            assert names == ["/stator/test/.epoch", "/stator/test/instances/a", "/stator/test/ünïcode"]
            assert [entry.value for entry in await mine.get_prefix("")] == [b"x", b"\x00\xff"]

    run(scene)


def test_compaction_under_a_watcher(tmp_path: Path) -> None:
    async def scene() -> None:
        server = EtcdServer(tmp_path)
        async with started(server), connected(server.address) as mine:
            await mine.put("k/kept", b"x")
            await mine.put("k/goes", b"x")
            async with Reading(mine.watch("k/")) as watch:
                view = fold({}, await watch.next())
                server.pause()
                # The watch notices, since its member does not answer the question whether it is there.
                await asyncio.sleep(1.5)
                server.resume()
                await until(watch, view, view)
                # Cut off for good: meanwhile its revision is compacted away.
                await server.kill()
                await server.start()
                async with connected(server.address) as other:
                    await other.delete("k/goes")
                    revision = 0
                    for number in range(5):
                        revision = await other.put("k/new", str(number).encode())
                    await admin(server.address, "/v3/kv/compaction", {"revision": str(revision)})
                await until(watch, view, {"k/kept": b"x", "k/new": b"4"})
                await mine.put("k/new", b"5")
                (change,) = await until(watch, {"k/kept": b"x", "k/new": b"4"}, {"k/kept": b"x", "k/new": b"5"})
                assert not change.reset

    run(scene)


def test_a_wiped_namespace_is_repaired_and_nobody_is_gone_meanwhile(tmp_path: Path) -> None:
    async def scene() -> None:
        server = EtcdServer(tmp_path)
        async with started(server), connected(server.address) as mine, connected(server.address) as other:  # fmt: skip
            lease = await mine.grant_lease(TTL_S)
            await mine.put("instances/a", b"x", lease)
            async with Reading(other.watch("instances/")) as watch:
                view = fold({}, await watch.next())
                await admin(
                    server.address, "/v3/kv/deleterange", {"key": b64("/stator/"), "range_end": b64("/stator0")}
                )
                wiped_at, back = loop_time(), None
                while back is None and loop_time() < wiped_at + TTL_S + PATIENCE_S:
                    back = await other.get("instances/a")
                    await asyncio.sleep(0.05)
                assert back is not None
                assert back.value == b"x"
                # Longer than watchers keep what they knew: it is really there.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TTL_S + 1.0):
                        while True:
                            view = fold(view, await watch.next(60))
                            assert view == {"instances/a": b"x"}
            assert not lease.lost.is_set()

    run(scene)


def test_an_older_copy_of_the_store_is_told_again_what_it_lacks(tmp_path: Path) -> None:
    async def scene() -> None:
        server = EtcdServer(tmp_path / "one")
        async with started(server), connected(server.address) as mine:
            await mine.put("kept", b"x")
            await server.kill(signal.SIGTERM)
            (server.directory / "data").rename(tmp_path / "copy")
            shutil.copytree(tmp_path / "copy", server.directory / "data")
            await server.start()
            lease = await mine.grant_lease(TTL_S)
            await mine.put("instances/a", b"x", lease)
            for _ in range(3):
                await mine.put("later", b"y")
            await server.wipe()
            (tmp_path / "copy").rename(server.directory / "data")
            await server.start()
            async with Reading(mine.watch("")) as watch:
                await until(watch, {}, {"kept": b"x", "instances/a": b"x"})
            assert not lease.lost.is_set()

    run(scene)


def three(directory: Path) -> list[EtcdServer]:
    peers = {f"m{number}": f"http://127.0.0.1:{free_port()}" for number in range(3)}
    return [EtcdServer(directory / name, name=name, peers=peers) for name in peers]


def test_members_fail_one_at_a_time(tmp_path: Path) -> None:
    """Killed and stopped: the watch misses nothing and repeats nothing, the lease lives, calls are answered."""

    async def scene() -> None:
        servers = three(tmp_path)
        addresses = [server.address for server in servers]
        async with started(*servers):
            async with connected(*addresses) as mine, connected(*addresses) as other:  # fmt: skip
                lease = await mine.grant_lease(TTL_S)
                await mine.put("k/leased", b"x", lease)
                await other.put("k/n", b"start")
                async with Reading(other.watch("k/")) as watch:
                    view = fold({}, await watch.next())
                    seen: list[bytes] = []
                    for number, server in enumerate(servers):
                        if number == 1:
                            server.pause()
                        else:
                            await server.kill()
                        for step in range(5):
                            await mine.put("k/n", f"{number}.{step}".encode())
                        after = view | {"k/n": f"{number}.4".encode()}
                        batches = await until(watch, view, after)
                        assert not any(batch.reset for batch in batches)
                        seen += [entry.value for batch in batches for entry in batch.puts]
                        view = after
                        if number == 1:
                            server.resume()
                        else:
                            await server.start()
                # A put whose answer a stopped member kept is sent again: the same value twice is the same state.
                values = [value for value, _ in itertools.groupby(seen)]
                assert values == [f"{number}.{step}".encode() for number in range(3) for step in range(5)]
                assert not lease.lost.is_set()

    run(scene)


def test_without_a_majority_the_error_names_every_member(tmp_path: Path) -> None:
    async def scene() -> None:
        servers = three(tmp_path)
        addresses = [server.address for server in servers]
        async with started(*servers), connected(*addresses) as mine:
            lease = await mine.grant_lease(TTL_S)
            await mine.put("k", b"x", lease)
            for server in servers[1:]:
                await server.kill()
            error = await expect_error(ErrorCode.INSTANCE_LOST, mine.put("k", b"y", lease))
            assert all(address in error.message for address in addresses), error.message
            assert not lease.lost.is_set()
            async with asyncio.TaskGroup() as group:
                for server in servers[1:]:
                    group.create_task(server.start())
            async with Reading(mine.watch("")) as watch:
                # What was put under the lease meanwhile is there in the end.
                await until(watch, {}, {"k": b"y"})

    run(scene)


async def enable_auth(address: str) -> None:
    for user in ("root", "stator", "stranger"):
        await admin(address, "/v3/auth/user/add", {"name": user, "password": f"{user}-password"})
    for role in ("root", "stator"):
        await admin(address, "/v3/auth/role/add", {"name": role})
        await admin(address, "/v3/auth/user/grant", {"user": role, "role": role})
    permission = {"permType": "READWRITE", "key": b64("/stator/"), "range_end": b64("/stator0")}
    await admin(address, "/v3/auth/role/grant", {"name": "stator", "perm": permission})
    await admin(address, "/v3/auth/enable", {})


def test_users_and_their_tokens(tmp_path: Path) -> None:
    async def scene() -> None:
        server = EtcdServer(tmp_path, options=["--auth-token-ttl", "1"])
        async with started(server), contextlib.AsyncExitStack() as clients:
            await enable_auth(server.address)

            async def connect(**settings: Any) -> EtcdDiscovery:
                return await clients.enter_async_context(connected(server.address, **settings))

            mine = await connect(user="stator", password="stator-password")
            lease = await mine.grant_lease(TTL_S)
            await mine.put("k/1", b"x", lease)
            async with Reading(mine.watch("k/")) as watch:
                view = fold({}, await watch.next())
                # Tokens last a second; the one that was made first is long forgotten.
                await asyncio.sleep(2.5)
                await mine.put("k/2", b"y")
                await until(watch, view, {"k/1": b"x", "k/2": b"y"})
                # Every token is void after a change of the users.
                token = (
                    await admin(server.address, "/v3/auth/authenticate", {"name": "root", "password": "root-password"})
                )["token"]
                await admin(
                    server.address, "/v3/auth/user/add", {"name": "more", "password": "p"},
                    headers={"Authorization": token},
                )  # fmt: skip
                await mine.put("k/3", b"z")
                await until(watch, {"k/1": b"x", "k/2": b"y"}, {"k/1": b"x", "k/2": b"y", "k/3": b"z"})
            assert not lease.lost.is_set()
            nobody = await expect_error(ErrorCode.UNAUTHORIZED, (await connect()).get("k"))
            assert "ETCD_AUTH_USERNAME" in nobody.message
            wrong = await connect(user="stator", password="guessed")
            refused = await expect_error(ErrorCode.UNAUTHORIZED, wrong.get("k"))
            assert "stator" in refused.message
            assert "guessed" not in refused.message
            stranger = await connect(user="stranger", password="stranger-password")
            denied = await expect_error(ErrorCode.UNAUTHORIZED, stranger.get("k"))
            assert "/stator/" in denied.message
            with pytest.raises(Exception, match="permission"):
                await anext(stranger.watch("k/"))

    run(scene)


def test_tls_with_client_certificates(tmp_path: Path) -> None:
    async def scene() -> None:
        files = make_certificates(tmp_path / "certs")
        options = [
            "--cert-file", files.server_cert, "--key-file", files.server_key,
            "--trusted-ca-file", files.ca, "--client-cert-auth",
        ]  # fmt: skip
        server = EtcdServer(tmp_path / "etcd", scheme="https", options=options)
        async with started(server), contextlib.AsyncExitStack() as clients:

            async def connect(tls: TlsFiles | None) -> EtcdDiscovery:
                return await clients.enter_async_context(connected(server.address, tls=tls))

            mine = await connect(TlsFiles(files.ca, files.client_cert, files.client_key))
            async with Reading(mine.watch("")) as watch:
                view = fold({}, await watch.next())
                await mine.put("k", b"x")
                await until(watch, view, {"k": b"x"})
            for tls in (TlsFiles(files.ca), None):
                error = await expect_error(ErrorCode.INSTANCE_LOST, (await connect(tls)).get("k"))
                assert server.address in error.message

    run(scene)


def test_a_member_without_its_gateway_is_told_what_to_set(tmp_path: Path) -> None:
    async def scene() -> None:
        server = EtcdServer(tmp_path, options=["--enable-grpc-gateway=false"])
        async with started(server), connected(server.address) as mine:
            error = await expect_error(ErrorCode.PROTOCOL, mine.get("k"))
            assert "enable-grpc-gateway: true" in error.message
            assert server.address in error.message

    run(scene)


def test_one_lease_lost_on_a_living_cluster(tmp_path: Path) -> None:
    """Revoked by an operator: the holder is told, as after a pause of a TTL."""

    async def scene() -> None:
        server = EtcdServer(tmp_path)
        async with started(server), connected(server.address) as mine:
            lease = await mine.grant_lease(TTL_S)
            await mine.put("k", b"x", lease)
            await admin(server.address, "/v3/lease/revoke", {"ID": str(lease.lease_id)})
            async with asyncio.timeout(TTL_S + PATIENCE_S):
                await lease.lost.wait()
            await expect_error(ErrorCode.NOT_FOUND, mine.put("k", b"x", lease))

    run(scene)
