"""etcd and NATS as a node finds them at its start, and the deployment's token in etcd."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from random import SystemRandom

import msgspec

from stator.config.external import ExternalPlanes
from stator.discovery.etcd import EtcdDiscovery
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.graph.terminal import Terminal
from stator.graph.token import TOKEN_KEY
from stator.hub.client import DEFAULT_TIMEOUT_S
from stator.queue.nats_connection import JetStreamError, NatsConnection
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
RETRY_S = 2.0


@contextlib.asynccontextmanager
async def external_control_plane(
    external: ExternalPlanes, namespace: str, given: str | None, terminal: Terminal
) -> AsyncGenerator[str]:
    """The deployment's token, once both answer: the one that was given, else the namespace's, drawn by the first node.

    Until this is left, the token that was read from the namespace is put there again whenever it is missing, so that a
    wiped namespace has the same one for nodes that come later. Raises ConfigError if a service refuses us, or does not
    come up in time.
    """
    discovery = EtcdDiscovery(external.etcd, namespace=namespace)
    tasks = TaskOwner("external control plane")
    try:
        await _reach(terminal, "etcd", lambda: discovery.get(TOKEN_KEY))
        await _check_nats(external, terminal)
        if given is not None:
            yield given
            return
        token = await _shared_token(discovery)
        tasks.spawn(_keep_token(discovery, token), "keep the token")
        yield token
    finally:
        await tasks.close()
        await discovery.close()


async def _check_nats(external: ExternalPlanes, terminal: Terminal) -> None:
    connection = NatsConnection(external.nats, timeout_s=DEFAULT_TIMEOUT_S, random_source=SystemRandom())

    async def ask() -> None:
        try:
            await connection.api("INFO", None, msgspec.Raw)
        except JetStreamError as error:
            raise ConfigError(f"{connection.name}: JetStream refuses this node: {error}") from None

    try:
        await _reach(terminal, "NATS", ask)
    finally:
        await connection.close()


async def _reach(terminal: Terminal, what: str, ask: Callable[[], Awaitable[object]]) -> None:
    """Returns once it has answered."""
    told = False
    last = ""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                try:
                    await ask()
                    return
                except StatorError as error:
                    if error.code is not ErrorCode.INSTANCE_LOST:
                        raise ConfigError(error.message) from None
                    last = error.message
                    if not told:
                        told = True
                        terminal.say(f"stator: waiting for {what}: {last}")
                await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise ConfigError(f"{what} did not answer for {START_TIMEOUT_S:g} s: {last}") from None


async def _shared_token(discovery: EtcdDiscovery) -> str:
    await discovery.create(TOKEN_KEY, secrets.token_urlsafe(32).encode())
    found = await discovery.get(TOKEN_KEY)
    if found is None:
        raise ConfigError("the deployment's token was deleted from etcd while this node started; start it again")
    return found.value.decode()


async def _keep_token(discovery: EtcdDiscovery, token: str) -> None:
    async with contextlib.aclosing(discovery.watch(TOKEN_KEY)) as batches:
        async for batch in batches:
            present = [entry.value.decode() for entry in batch.puts if entry.key == TOKEN_KEY]
            if present and present[-1] != token:
                logger.error("the deployment's token in etcd is not the one that this node started with; restart it")
            elif not present and (batch.reset or TOKEN_KEY in batch.deletes):
                with contextlib.suppress(StatorError):
                    await discovery.create(TOKEN_KEY, token.encode())
