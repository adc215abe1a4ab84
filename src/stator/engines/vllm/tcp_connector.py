"""StatorConnector: vLLM's KV connector over Stator's request plane, for machines without RDMA or a core to spare.

vLLM loads it by `kv_connector_module_path` and makes one instance in the engine core (the scheduler side) and one in
every worker. The scheduler side is `core.kv_handover.HandoverBook`, a worker's is `tcp_worker.TransferWorker`; this is
what vLLM sees of them. The decode side pulls: its worker of rank r fetches from the prefill side's worker of rank r, so
both need the same tensor and pipeline parallel sizes. Peers prove the deployment's token to each other as on every
connection of the request plane. Written against vLLM 0.32.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec

from stator.core.kv_handover import HandoverBook, LoadParams, PrefillParams, StepWork, parse_load
from stator.engines.vllm.kv_rows import KvRows
from stator.engines.vllm.tcp_worker import ConnectorSettings, TransferWorker
from stator.errors import ConfigError
from stator.ids import InstanceId, RequestId

logger = logging.getLogger(__name__)

# Looked up by name: type checkers run where vLLM is not installed.
_base: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.base")
_metrics: Any = importlib.import_module("vllm.distributed.kv_transfer.kv_connector.v1.metrics")
_sources: Any = importlib.import_module("vllm.v1.metrics.cache_hit_source")


@dataclass
class StepMetadata(_base.KVConnectorMetadata):
    """From the scheduler side to every worker, with each step."""

    work: StepWork = field(default_factory=StepWork)


@dataclass
class WorkerAddress(_base.KVConnectorHandshakeMetadata):
    """From a worker to the scheduler side, at the start: where peers reach its request plane."""

    addresses: tuple[str, ...]


@dataclass
class HandoverStats(_metrics.KVConnectorStats):
    """`SchedulerStats.kv_connector_stats`: core.kv_handover.HandoverCounts, as last changed."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: Any) -> "HandoverStats":
        return other if other.data else self

    def reduce(self) -> dict[str, int | float]:
        return self.data

    def is_empty(self) -> bool:
        return not self.data


class StatorConnector(_base.KVConnectorBase_V1, _base.SupportsHMA):
    """Raises ConfigError for settings, and for a model, that it cannot serve."""

    _cache_hit_source = _sources.CacheHitSource.P2P

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise ConfigError(
                f"StatorConnector transfers models with one group of KV cache layers; this one has "
                f"{len(kv_cache_config.kv_cache_groups)}. Set kv-transfer-config to NixlConnector, or "
                "disable-hybrid-kv-cache-manager if the model's layers then form one group"
            )
        parallel = vllm_config.parallel_config
        if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
            raise ConfigError("StatorConnector does not know context parallelism; use NixlConnector")
        self._settings = ConnectorSettings.parse(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._sizes = (parallel.pipeline_parallel_size, parallel.tensor_parallel_size)
        self._block_size: int = vllm_config.cache_config.block_size
        self._num_blocks: int = kv_cache_config.num_blocks
        # Scheduler side.
        self._book = HandoverBook(self._block_size)
        self._worker_addresses: tuple[tuple[str, ...], ...] = ()
        self._counts = self._book.counts()
        # Worker side.
        self._worker: TransferWorker | None = None
        self._addresses: tuple[str, ...] = ()

    # Scheduler side

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], WorkerAddress]) -> None:
        self._worker_addresses = tuple(metadata[rank].addresses for rank in sorted(metadata))

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return self._kv_cache_config.transfer_group_ids

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        source = self._source_of(request)
        if source is None:
            return 0, False
        num_tokens = self._book.num_loadable(source, request.num_prompt_tokens, num_computed_tokens)
        return num_tokens, num_tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        request_id = RequestId(request.request_id)
        if (prefill := _prefill_of(request)) is not None:
            self._book.prefill_started(request_id, prefill.transfer_id)
        elif (source := self._source_of(request)) is not None:
            (block_ids,) = blocks.get_block_ids()
            self._book.load_started(request_id, source, block_ids, request.num_prompt_tokens, num_external_tokens)
            _used(request)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return StepMetadata(self._book.take_work())

    def update_connector_output(self, connector_output: Any) -> None:
        self._book.workers_reported(
            connector_output.finished_sending or (),
            connector_output.finished_recving or (),
            connector_output.invalid_block_ids or (),
        )

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if (source := self._source_of(request)) is not None:
            # It ended before it was given blocks.
            self._book.load_unused(source)
            _used(request)
            return False, None
        prefill = _prefill_of(request)
        if prefill is None:
            return False, None
        held = block_ids[0] if _finished_well(request) else []
        if not self._book.prefill_finished(RequestId(request.request_id), held):
            return False, None
        return True, self._params(prefill, request.num_computed_tokens)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def get_kv_connector_stats(self) -> HandoverStats | None:
        if self._worker is not None:
            return None
        counts = self._book.counts()
        if counts == self._counts:
            return None
        self._counts = counts
        return HandoverStats(asdict(counts))

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> HandoverStats:
        return HandoverStats(data or {})

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        rows = KvRows(kv_caches, self._num_blocks)
        pp_size, tp_size = self._sizes
        rank = _rank(tp_size)
        port_offset = self._vllm_config.parallel_config.data_parallel_index * pp_size * tp_size + rank
        self._worker = TransferWorker(self._settings, rows, rank=rank, port_offset=port_offset)
        self._addresses = self._worker.start()
        logger.info("KV blocks of %d bytes are served at %s", rows.block_bytes, ", ".join(self._addresses))

    def get_handshake_metadata(self) -> WorkerAddress:
        return WorkerAddress(self._addresses)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.submit(self._get_connector_metadata().work)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        if self._worker is None:
            return set(), set()
        self._worker.cancel(finished_req_ids)
        return self._worker.take_ended()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_block_ids() if self._worker is not None else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads run between steps, never within one."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are read from the cache when they are fetched."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    def shutdown(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    def _params(self, prefill: PrefillParams, num_tokens: int) -> dict[str, Any]:
        pp_size, tp_size = self._sizes
        params = LoadParams(
            transfer_id=prefill.transfer_id,
            remote_instance_id=InstanceId(self._settings.instance_id),
            remote_addresses=self._worker_addresses,
            remote_num_tokens=num_tokens,
            block_size=self._block_size,
            tp_size=tp_size,
            pp_size=pp_size,
        )
        return msgspec.to_builtins(params)

    def _source_of(self, request: Any) -> LoadParams | None:
        """Where to load a request's blocks from, as long as nothing has been done about it."""
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return None
        try:
            return parse_load(params, block_size=self._block_size, num_workers=self._sizes)
        except ValueError as error:
            logger.warning("request %s: its prompt is computed here: %s", request.request_id, error)
            _used(request)
            return None


def _prefill_of(request: Any) -> PrefillParams | None:
    params = request.kv_transfer_params
    if not params or not params.get("do_remote_decode"):
        return None
    try:
        return msgspec.convert(params, PrefillParams)
    except msgspec.ValidationError as error:
        logger.warning("request %s: its KV blocks are not held: %s", request.request_id, error)
        return None


def _used(request: Any) -> None:
    """A load is done once, whatever comes of it: not again after a preemption or a failure."""
    request.kv_transfer_params["do_remote_prefill"] = False


def _finished_well(request: Any) -> bool:
    return request.status.name in ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")


def _rank(tp_size: int) -> int:
    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    return state.get_pp_group().rank_in_group * tp_size + state.get_tp_group().rank_in_group


__all__: Sequence[str] = ["HandoverStats", "StatorConnector", "StepMetadata", "WorkerAddress"]
