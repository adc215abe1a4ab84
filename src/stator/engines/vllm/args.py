"""From a worker's section to vLLM's `AsyncEngineArgs`.

The flags go through vLLM's own command line parser, so that a value means here what it means on `vllm serve`. What an
engine under Stator must have is added: no statistics of vLLM's own, its KV events, the connector.
"""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from stator.engines.base import NodePlace
from stator.engines.vllm.connectors import read_config
from stator.engines.vllm.version import installed_version
from stator.errors import ConfigError

DEFAULT_CPU_KV_BYTES = 1 << 30
"""Without a size vLLM on CPUs demands nearly all of the machine's memory, and fails where others use some."""

OURS = {
    "kv_events_config": "Stator's routers follow the engine's KV events by it",
    "disable_log_stats": "Stator's metrics come from the engine's statistics",
    "node_rank": "the nodes of one engine find each other, and the first to start is rank 0",
    "master_addr": "the nodes of one engine find each other, and the first to start is rank 0",
}
_OF_ONE_NODE = {"hf_token", "download_dir", "master_port", "numa_bind_nodes", "numa_bind_cpus"}
"""Flags that may differ between the nodes of one engine, or must not travel."""

_CPU_DEFAULTS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""vLLM would bind every engine of a machine to the same cores."""

_ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""On CPUs vLLM gives a single worker a process of its own, for the binding only: half a GB and ten seconds."""


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """model: a directory, stator:NAME or a hub id, of which revision is a branch, tag or commit. flags: of vLLM, by
    name with underscores, less those below.

    name: served; in block hashes and to clients. lora_modules: adapter names and their directories.
    """

    model: str
    name: str
    flags: dict[str, Any]
    revision: str | None = None
    kv_transfer_config: dict[str, Any] | str | None = None
    lora_modules: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def pooling(self) -> bool:
        """It is said that the model makes embeddings, or the like, and no text: its blocks are of use to nobody."""
        return self.flags.get("runner") == "pooling"

    @property
    def prefix_caching(self) -> bool:
        return self.flags.get("enable_prefix_caching") is not False and not self.pooling

    @property
    def num_workers(self) -> int:
        """vLLM's worker processes for each data-parallel rank: tensor times pipeline parallel size."""
        sizes = (self.flags.get(key) for key in ("tensor_parallel_size", "pipeline_parallel_size"))
        return prod(int(size or 1) for size in sizes)

    @property
    def num_nodes(self) -> int:
        return int(self.flags.get("nnodes") or 1)

    @property
    def master_port(self) -> int | None:
        return self.flags.get("master_port")

    @property
    def dp_ranks(self) -> int:
        return int(self.flags.get("data_parallel_size") or 1)


def settings_from_section(values: Mapping[str, Any]) -> VllmSettings:
    """Raises ConfigError, naming the flag, for one that Stator sets itself, and for a missing model."""
    flags = {key.replace("-", "_"): value for key, value in values.items()}
    model = flags.pop("model", None)
    if not isinstance(model, str):
        raise ConfigError("engine vllm needs a model: a directory, stator:NAME or a hub id")
    for key, reason in OURS.items():
        if flags.get(key) is not None:
            raise ConfigError(f"{key.replace('_', '-')} cannot be set: {reason}; leave it out")
    _check_nodes(flags)
    names = flags.pop("served_model_name", None)
    name = names[0] if isinstance(names, list) and names else names
    kv_transfer_config = flags.pop("kv_transfer_config", None)
    lora_modules = flags.pop("lora_modules", None) or {}
    revision = flags.pop("revision", None)
    return VllmSettings(model, str(name or model), flags, revision, kv_transfer_config, dict(lora_modules))


def _check_nodes(flags: Mapping[str, Any]) -> None:
    if int(flags.get("nnodes") or 1) == 1:
        return
    if int(flags.get("data_parallel_size") or 1) > 1:
        raise ConfigError(
            f"nnodes is {flags['nnodes']} and data-parallel-size {flags['data_parallel_size']}: Stator spreads one "
            f"replica over several nodes; leave data-parallel-size out, and start as many groups of nodes as wanted"
        )
    if flags.get("distributed_executor_backend") not in (None, "mp"):
        raise ConfigError(
            f"distributed-executor-backend is {flags['distributed_executor_backend']}: with nnodes "
            f"{flags['nnodes']} it must be mp, or left out"
        )


def shared_settings(settings: VllmSettings) -> dict[str, str]:
    """What the nodes of one engine must agree on, as text by flag; no secret is in it."""
    values: dict[str, Any] = {
        "model": settings.model,
        "served_model_name": settings.name,
        "revision": settings.revision,
        "kv_transfer_config": read_config(settings.kv_transfer_config),
        "lora_modules": settings.lora_modules,
        **settings.flags,
    }
    texts = {
        key.replace("_", "-"): value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        for key, value in values.items()
        if value not in (None, {}) and key not in _OF_ONE_NODE
    }
    return {**texts, "vLLM's version": installed_version() or "unknown"}


def node_flags(place: NodePlace) -> dict[str, Any]:
    return {
        "nnodes": place.num_nodes,
        "node_rank": place.rank,
        "master_addr": place.master_address,
        "master_port": place.master_port,
        "distributed_executor_backend": "mp",
    }


def node_environment(place: NodePlace) -> dict[str, str]:
    """vLLM's queues between nodes listen at this address, which must be a number. May ask a name server."""
    host = place.hosts[place.rank]
    try:
        return {"VLLM_HOST_IP": str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])}
    except OSError as error:
        raise ConfigError(
            f"{host}, where other nodes reach this one, has no address here: {error.strerror}; see --advertise"
        ) from None


def command_line(
    settings: VllmSettings, *, model: str, kv_transfer: Mapping[str, Any] | None, **added: Any
) -> list[str]:
    """vLLM's arguments. model: resolved, for vLLM. kv_transfer: the connector's configuration, if
    there is one. added: further flags."""
    flags = {**settings.flags, **{key: value for key, value in added.items() if value is not None}}
    arguments = ["--model", model, "--served-model-name", settings.name, "--disable-log-stats"]
    if kv_transfer is not None:
        arguments += ["--kv-transfer-config", json.dumps(kv_transfer)]
    for key, value in flags.items():
        arguments += _argument(key, value)
    return arguments


def _argument(key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if value is None:
        return []
    if value is True:
        return [flag]
    if value is False:
        return ["--no-" + key.replace("_", "-")]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    if isinstance(value, list):
        return [flag, *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
    return [flag, str(value)]


_set_by_us: dict[str, str] = {}


def user_environment() -> dict[str, str]:
    """The process's, without what `set_environment` put there for an earlier engine."""
    return {key: value for key, value in os.environ.items() if _set_by_us.get(key) != value}


def set_environment(added: Mapping[str, str], *, gpu: bool, num_workers: int) -> None:
    """Before vLLM is imported: its processes inherit it. What the user has set stays."""
    on_cpus = {} if gpu else {**_CPU_DEFAULTS, **(_ONE_PROCESS if num_workers == 1 else {})}
    users = user_environment()
    chosen = {key: value for key, value in {**added, **on_cpus}.items() if key not in users}
    os.environ.update(chosen)
    _set_by_us.update(chosen)


def cpu_flags(settings: VllmSettings) -> dict[str, Any]:
    """Flags that an engine on CPUs gets if the user says nothing of the like."""
    sized = any(settings.flags.get(key) for key in ("kv_cache_memory_bytes", "num_gpu_blocks_override"))
    return {} if sized or os.environ.get("VLLM_CPU_KVCACHE_SPACE") else {"kv_cache_memory_bytes": DEFAULT_CPU_KV_BYTES}


def parse(arguments: list[str]) -> Any:
    """An AsyncEngineArgs. Imports vLLM, which takes seconds. Raises ConfigError with vLLM's own words."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports]

    class Parser(FlexibleArgumentParser):  # pyright: ignore[reportUntypedBaseClass]
        def error(self, message: str) -> None:
            raise ConfigError(f"vLLM refuses a flag: {message}")

    parsed = AsyncEngineArgs.add_cli_args(Parser()).parse_args(arguments)
    return AsyncEngineArgs.from_cli_args(parsed)
