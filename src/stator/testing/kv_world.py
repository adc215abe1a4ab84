"""Workers that hold KV blocks, in one process: real block managers, publishers, servers and discovery, no model."""

from collections.abc import Callable, Sequence
from random import Random

from stator.core.blocks import BlockManager
from stator.core.hashing import block_hashes
from stator.core.kv_stream import BacklogLimits
from stator.discovery.base import Lease
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.engines.base import KvListener
from stator.ids import InstanceId
from stator.messages.instances import InstanceInfo
from stator.messages.kv_events import KV_EVENTS_ENDPOINT, KvSubscribe
from stator.messages.tokens import TokenBuffer, pack
from stator.runtime.directory import InstanceDirectory, register_instance
from stator.transport.base import Endpoint
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen, TransportSettings
from stator.worker.kv_events import DEFAULT_LIMITS, KvPublisher

BLOCK_SIZE = 4
MODEL = "model"


def prompt_hashes(prompt: TokenBuffer) -> list[int]:
    return [*block_hashes(prompt, BLOCK_SIZE, model=MODEL)]


def make_prompts(rng: Random, count: int, *, max_blocks: int = 24) -> list[TokenBuffer]:
    """Prompts that share prefixes with each other, as a tree."""
    prompts: list[list[int]] = [[]]
    for _ in range(count):
        trunk = rng.choice(prompts)
        shared = trunk[: BLOCK_SIZE * rng.randint(0, len(trunk) // BLOCK_SIZE)]
        num_more = rng.randint(1, max(1, max_blocks - len(shared) // BLOCK_SIZE))
        prompts.append(shared + [rng.randrange(1, 1000) for _ in range(num_more * BLOCK_SIZE)])
    return [pack(prompt) for prompt in prompts[1:]]


class CacheOnly:
    """An engine as far as its prefix cache goes; implements worker.kv_events.WatchesKv."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, model=MODEL)
        self._listeners: list[KvListener] = []

    @property
    def num_listeners(self) -> int:
        return len(self._listeners)

    def run(self, prompt: TokenBuffer) -> None:
        """As after a request with this prompt: its blocks are cached, others perhaps evicted for them."""
        table = self.blocks.new_table()
        num_tokens = len(prompt) // 4
        if self.blocks.acquire(table, prompt, num_tokens) is not None:
            self.blocks.commit(table, prompt, num_tokens)
            self.blocks.release(table)
        self._publish()

    def reset(self) -> None:
        self.blocks.reset_cache()
        self._publish()

    def held(self) -> set[int]:
        return set(self.blocks.cached_hashes())

    def watch_kv(self, listener: KvListener) -> Callable[[], None]:
        listener(self.blocks.snapshot())
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _publish(self) -> None:
        events = self.blocks.take_events()
        for listener in list(self._listeners) if events else []:
            listener(events)


class KvWorker:
    """One instance of KvWorld: engine, publisher, server and lease."""

    def __init__(
        self, name: str, engine: CacheOnly, server: RequestPlaneServer, publisher: KvPublisher, lease: Lease
    ) -> None:
        self.instance_id = InstanceId(name)
        self.engine = engine
        self.server = server
        self.publisher = publisher
        self.lease = lease

    async def die(self) -> None:
        """Its connections break and its lease ends."""
        await self.hang_up()
        await self.lease.revoke()

    async def hang_up(self) -> None:
        """Its connections break; the lease lives on."""
        await self.publisher.close()
        await self.server.close()


class KvWorld:
    """Starts and stops workers; `client` reaches them, `directory` knows them. For any event loop, virtual ones too."""

    def __init__(self, *, settings: TransportSettings | None = None, limits: BacklogLimits = DEFAULT_LIMITS) -> None:
        self._settings = settings
        self._limits = limits
        self._network = InProcessNetwork()
        self._store = MemoryKeyStore(random_source=Random(0))
        self._discovery = MemoryDiscovery(self._store)
        self.directory = InstanceDirectory(self._discovery)
        self.client = RequestPlaneClient(Identity(), network=self._network, settings=settings)
        self.workers: dict[InstanceId, KvWorker] = {}

    async def start(self) -> None:
        await self.directory.start()

    async def add(self, name: str, *, num_blocks: int = 64, role: str = "decode") -> KvWorker:
        """A worker that is announced; returns once the directory has it."""
        engine = CacheOnly(num_blocks)
        server, publisher = await self._serve(name, engine)
        lease = await self._discovery.grant_lease()
        worker = KvWorker(name, engine, server, publisher, lease)
        await register_instance(self._discovery, lease, self._info(name, role, server.addresses))
        await self.directory.wait_for(lambda d: d.get(worker.instance_id) is not None, 10.0)
        self.workers[worker.instance_id] = worker
        return worker

    async def remove(self, worker: KvWorker) -> None:
        """It dies; returns once the directory knows."""
        del self.workers[worker.instance_id]
        await worker.die()
        await self.directory.wait_for(lambda d: d.get(worker.instance_id) is None, 10.0)

    async def restart(self, worker: KvWorker) -> None:
        """Its server and publisher are made anew; engine, address and lease stay."""
        await worker.hang_up()
        worker.server, worker.publisher = await self._serve(worker.instance_id, worker.engine)

    async def close(self) -> None:
        for worker in list(self.workers.values()):
            await worker.die()
        self.workers.clear()
        await self.directory.close()
        await self.client.close()
        await self._discovery.close()
        self._store.close()

    async def _serve(self, name: str, engine: CacheOnly) -> tuple[RequestPlaneServer, KvPublisher]:
        server = RequestPlaneServer(
            Identity(instance_id=InstanceId(name)),
            Listen(host=None, inproc_name=name),
            network=self._network,
            settings=self._settings,
        )
        publisher = KvPublisher(engine, limits=self._limits)
        server.register(Endpoint(KV_EVENTS_ENDPOINT, KvSubscribe, publisher.kv_events))
        await server.start()
        return server, publisher

    def _info(self, name: str, role: str, addresses: Sequence[str]) -> InstanceInfo:
        return InstanceInfo(
            instance_id=InstanceId(name),
            service="Worker",
            role=role,
            addresses=tuple(addresses),
            endpoints=(KV_EVENTS_ENDPOINT,),
            host="host",
            pid=1,
            model=MODEL,
        )
