"""A further node of a vLLM engine: the workers of this node, without scheduler and front end.

What `vllm serve --headless` does for a node rank above 0, with the same pieces: a configuration made for it, and the
executor, whose workers take the steps that rank 0's executor sends.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from stator.engines.vllm import args as vllm_args


def build(arguments: list[str]) -> Any:
    """A MultiprocExecutor whose workers have loaded their part of the model. Waits for the other nodes.

    Raises ConfigError for arguments that vLLM refuses."""
    from vllm.usage.usage_lib import UsageContext  # pyright: ignore[reportMissingImports]
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor  # pyright: ignore[reportMissingImports]

    from stator.engines.vllm import nemotron_nas

    nemotron_nas.register()
    parsed = vllm_args.parse(arguments)
    config = parsed.create_engine_config(usage_context=UsageContext.ENGINE_CONTEXT, headless=True)
    return MultiprocExecutor(config)


class FurtherNode:
    """Must be shut down by whoever started it."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._stopping = False

    def on_dead(self, callback: Callable[[str], None]) -> None:
        """Once, on the running loop, when a worker process has ended without being asked to; at once if it has."""
        loop = asyncio.get_running_loop()

        def ended() -> None:
            if not self._stopping:
                callback("one of vLLM's worker processes ended; vLLM's messages above have the cause")

        def tell() -> None:
            # From vLLM's thread, which may outlive the loop by a moment.
            if not self._stopping:
                loop.call_soon_threadsafe(ended)

        self._executor.register_failure_callback(tell)

    async def shut_down(self) -> None:
        self._stopping = True
        await asyncio.to_thread(self._executor.shutdown)
