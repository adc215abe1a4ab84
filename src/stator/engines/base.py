"""The engine seam: what computes tokens.

Implementations: `engines.local` (numpy), `engines.sim` (its scheduler without a model) and `engines.vllm`. One suite
(`stator.testing.contracts.engine`) runs on all. An engine lives in its worker's process and is called on the event
loop; it may compute on threads or in processes of its own, but calls sinks on the event loop only.

Streams: `generate` and `prefill` return at once; the sink then gets items and one end, as `transport.base.Sink`
says. All sequences that one engine step advanced are pushed within one callback of the loop, so that the transport
can send them to a peer in one frame. A refused request ends its sink with INVALID_REQUEST and never raises.

Death: an engine that can compute no more ends every stream and tells its host. Those whose prompt or first token the
step that failed was computing end with ENGINE_CRASHED, as far as the engine can tell; all others, and all streams of an
engine that was killed from outside, with ENGINE_DEAD.

KV blocks: a sequence's blocks are freed (kept as reusable prefix cache) when its stream ended. A finished prefill
holds its blocks for `TRANSFER_HOLD_S`, or until they were fetched or released.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from stator.ids import InstanceId, RequestId, TransferId
from stator.messages.embeddings import EmbedRequest
from stator.messages.engine import EngineInfo, EngineLoad, EngineRequest, KvEvent
from stator.transport.base import Endpoint, Sink, TransportClient
from stator.transport.settings import Identity

TRANSFER_HOLD_S = 30.0


class EngineHost(Protocol):
    """What a worker lends its engine: a way to serve KV blocks to peers and to fetch theirs.

    register must be called during `Engine.start` or before; addresses are valid from `start` on. identity: with the
    token, for engines that serve blocks from processes of their own.
    on_dead: the engine calls it once when it can compute no more; the worker leaves discovery and stops.
    """

    instance_id: InstanceId
    client: TransportClient

    @property
    def identity(self) -> Identity: ...

    @property
    def addresses(self) -> tuple[str, ...]: ...

    def register(self, endpoint: Endpoint) -> None: ...

    def on_dead(self, reason: str) -> None: ...


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Which part of an engine over several nodes this process runs.

    hosts: of all nodes, by rank. instance_id: of rank 0, under which the engine is known. master_address, master_port:
    where the engine's own processes meet.
    """

    rank: int
    hosts: tuple[str, ...]
    instance_id: InstanceId
    master_address: str
    master_port: int

    @property
    def num_nodes(self) -> int:
        return len(self.hosts)


KvListener = Callable[[Sequence[KvEvent]], None]


class Engine(Protocol):
    async def start(self, host: EngineHost) -> EngineInfo:
        """Load the model. Raises ConfigError for a model or a setting that cannot work, naming it."""
        ...

    def generate(self, request: EngineRequest, sink: Sink) -> None:
        """Items are TokenDelta. With `request.transfer`, fetches the described blocks and recomputes only what it could
        not get, at least the last token; if the fetch fails the prompt is computed here, and the text is the same."""
        ...

    def prefill(self, request: EngineRequest, sink: Sink) -> None:
        """Compute the KV blocks of prompt and resume ids and hold them. One item, a PrefillResult, then the end."""
        ...

    def embed(self, request: EmbedRequest, sink: Sink) -> None:
        """One item, an Embedding, then the end. It depends on model and request alone. Sequences go on meanwhile, and
        `abort` ends it too. UNSUPPORTED unless `EngineInfo.can_embed`, and for dimensions that the model has not."""
        ...

    def abort(self, request_id: RequestId) -> None:
        """Stop it in any phase, free its blocks before the next step. Its sink ends with CANCELLED; none after that.
        Unknown ids are ignored."""
        ...

    def release(self, transfer_id: TransferId) -> None:
        """Nobody will fetch these held blocks. Idempotent. The id is `PrefillResult.transfer["transfer_id"]`."""
        ...

    async def holds_ended(self) -> None:
        """Returns once no finished prefill holds blocks that wait to be fetched; after TRANSFER_HOLD_S without a new
        one at the latest."""
        ...

    def load(self) -> EngineLoad:
        """A reading, cheap enough to take every step."""
        ...

    def cached_prefix_tokens(self, request: EngineRequest) -> int:
        """Leading tokens of the request that this engine would not compute, were it to start now."""
        ...

    def watch_kv(self, listener: KvListener) -> Callable[[], None]:
        """Calls listener with the whole state as BlocksStored events before returning, then with every change, in
        order. Returns the function that ends it."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget every block that no sequence uses; emits BlocksCleared. False if blocks in use remain cached."""
        ...

    async def stop(self) -> None:
        """End every stream with ENGINE_DEAD, free everything. No thread, process or file is left. Idempotent."""
        ...


@runtime_checkable
class SpreadEngine(Engine, Protocol):
    """An engine that can spread over several nodes, with one process on each.

    num_nodes: as configured. place: must be set before a start if num_nodes is not 1; then rank 0 is started with
    `start` and serves requests, the others with `start_further_node`. master_port: as configured, None for a free one.
    """

    num_nodes: int
    place: NodePlace | None
    master_port: int | None

    def shared_settings(self) -> Mapping[str, str]:
        """What must be equal on all nodes, as text by flag."""
        ...

    async def start_further_node(self, host: EngineHost) -> None:
        """Load this node's part of the model. From then on only `stop` may be called. host.on_dead is called when it
        ends by itself. Raises ConfigError as `start` does."""
        ...
