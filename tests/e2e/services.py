"""etcd and NATS of a test's own, as nodes are told of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from stator.testing.real_servers import EtcdServer, NatsServer


@contextlib.asynccontextmanager
async def services(directory: Path) -> AsyncIterator[dict[str, str]]:
    """Their addresses, as environment variables."""
    etcd, nats = EtcdServer(directory / "etcd"), NatsServer(directory / "nats")
    try:
        await asyncio.gather(etcd.start(), nats.start())
        yield {"NATS_SERVER": f"nats://127.0.0.1:{nats.port}", "ETCD_ENDPOINTS": etcd.address}
    finally:
        await asyncio.gather(etcd.kill(), nats.kill())
