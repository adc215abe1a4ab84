"""What vLLM is started with on this host, and what its adapter keeps of that."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stator.config.hub import Needs, resolve_async
from stator.engines.base import EngineHost, NodePlace
from stator.engines.grammar_gate import GrammarGate
from stator.engines.vllm import args as vllm_args
from stator.engines.vllm import connectors
from stator.engines.vllm.args import VllmSettings
from stator.engines.vllm.connectors import ConnectorPlan
from stator.engines.vllm.kv_feed import KvEndpoint, kv_events_settings


@dataclass(frozen=True, slots=True)
class Preparation:
    """kv_endpoints: where it will publish KV events; none if it has no prefix cache. gate: the caller's to close."""

    command_line: list[str]
    plan: ConnectorPlan
    kv_endpoints: list[KvEndpoint]
    gate: GrammarGate | None


async def prepare(
    settings: VllmSettings, host: EngineHost, *, place: NodePlace | None, gpu: bool, directory: Path, hold_s: float
) -> Preparation:
    """Get the model's files, and set this process's environment. Raises ConfigError.

    directory: for sockets and the token. hold_s: for how long a finished prefill's blocks wait.
    """
    plan = _connector_plan(settings, host, place=place, gpu=gpu, directory=directory, hold_s=hold_s)
    added: dict[str, Any] = {}
    if not settings.flags.get("worker_extension_cls"):
        added["worker_extension_cls"] = plan.worker_extension
    endpoints: list[KvEndpoint] = []
    if settings.prefix_caching:
        added["kv_events_config"], endpoints = kv_events_settings(directory / "kv", settings.dp_ranks)
    if not gpu:
        added |= vllm_args.cpu_flags(settings)
    if settings.lora_modules:
        added["enable_lora"] = True
    model = await resolve_async(settings.model, settings.revision, needs=Needs.VLLM)
    if model.revision:
        added |= {"revision": model.revision, "tokenizer_revision": model.revision}
    environment = dict(plan.environment)
    if place is not None:
        added |= vllm_args.node_flags(place)
        environment |= await asyncio.to_thread(vllm_args.node_environment, place)
    vllm_args.set_environment(environment, gpu=gpu, num_workers=settings.num_workers)
    kv_transfer = None if settings.pooling else plan.config
    command_line = vllm_args.command_line(settings, model=model.engine_model_string, kv_transfer=kv_transfer, **added)
    tokenizer = model.directory / "tokenizer.json"
    return Preparation(command_line, plan, endpoints, GrammarGate(tokenizer) if tokenizer.is_file() else None)


def _connector_plan(
    settings: VllmSettings, host: EngineHost, *, place: NodePlace | None, gpu: bool, directory: Path, hold_s: float
) -> ConnectorPlan:
    if settings.pooling:
        return ConnectorPlan("none", {})
    plane = connectors.transfer_plane(host, place, directory, num_data_parallel=settings.dp_ranks, hold_s=hold_s)
    return connectors.plan_connector(
        settings.kv_transfer_config, plane, gpu=gpu, environment=vllm_args.user_environment()
    )
