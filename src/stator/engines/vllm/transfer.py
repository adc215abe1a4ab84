"""Transfer parameters of vLLM engines: what a prefill engine answers and a decode engine gets.

vLLM's own dict, whichever connector made it, travels inside unread. Around it is what no connector checks: that the
blocks were computed for these tokens, this LoRA and this cache salt, by an engine with the same connector.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from stator.core.kv_handover import LoadParams
from stator.engines.transfer.fetcher import RELEASE_TIMEOUT_S
from stator.engines.transfer.messages import RELEASE_ENDPOINT, ReleaseRequest, digest_tokens
from stator.engines.vllm.connectors import NIXL_CONNECTOR, STATOR_CONNECTOR
from stator.errors import StatorError
from stator.ids import RequestId, TransferId
from stator.messages.engine import EngineRequest
from stator.messages.tokens import num_tokens
from stator.runtime.context import CallContext, loop_time
from stator.transport.addresses import TcpAddress, UnixAddress, parse_address
from stator.transport.base import Target, TransportClient
from stator.transport.calls import stream

logger = logging.getLogger(__name__)

ALIVE_TIMEOUT_S = 1.0
"""For a connection to the prefill engine's machine. NIXL itself waits 5 s for a dead one, and stalls every request."""


class VllmTransfer(msgspec.Struct, frozen=True):
    """`PrefillResult.transfer` of a vLLM engine.

    num_tokens: leading tokens of prompt and resumed output whose KV is held; digest: of those (`digest_tokens`).
    num_cached_tokens: of those, found in the prefill engine's prefix cache. params: vLLM's `kv_transfer_params`.
    """

    connector: str
    transfer_id: TransferId
    num_tokens: int
    num_cached_tokens: int
    digest: str
    params: dict[str, Any]


def prefill_params(connector: str, transfer_id: TransferId) -> dict[str, Any]:
    """`kv_transfer_params` that ask for a prefill whose blocks are held. Goes with max_tokens 1."""
    if connector == STATOR_CONNECTOR:
        return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    return {"do_remote_decode": True, "do_remote_prefill": False}


def result_transfer(
    params: dict[str, Any] | None,
    *,
    connector: str,
    transfer_id: TransferId,
    request: EngineRequest,
    num_cached_tokens: int,
) -> dict[str, Any]:
    """What `PrefillResult.transfer` is, from the `kv_transfer_params` that vLLM answered a prefill with.

    Raises ValueError if vLLM holds no blocks.
    """
    if not params:
        raise ValueError(f"vLLM's {connector} answered the prefill without transfer parameters: it holds no KV blocks")
    count = num_tokens(request.prompt_ids) + num_tokens(request.resume_ids)
    digest = digest_tokens(request, count)
    transfer = VllmTransfer(connector, transfer_id, count, min(num_cached_tokens, count), digest, params)
    return msgspec.to_builtins(transfer)


def parse_transfer(request: EngineRequest, *, connector: str) -> VllmTransfer:
    """connector: of this engine. Raises ValueError, saying what does not fit, if the blocks are not this request's."""
    try:
        transfer = msgspec.convert(request.transfer, VllmTransfer)
    except msgspec.ValidationError as error:
        raise ValueError(f"not transfer parameters of a vLLM engine: {error}") from error
    if transfer.connector != connector:
        raise ValueError(f"made by {transfer.connector}, this engine has {connector}")
    if not 0 < transfer.num_tokens <= num_tokens(request.prompt_ids) + num_tokens(request.resume_ids):
        raise ValueError(f"describes {transfer.num_tokens} tokens, which the request does not have")
    if transfer.digest != digest_tokens(request, transfer.num_tokens):
        raise ValueError("was computed for other tokens, LoRA or cache salt")
    return transfer


def decode_params(request: EngineRequest, *, connector: str) -> dict[str, Any]:
    """`kv_transfer_params` for the decode request, its own copy: vLLM writes into it. Raises ValueError as
    `parse_transfer` does."""
    return dict(parse_transfer(request, connector=connector).params)


async def peer_alive(params: dict[str, Any], *, timeout_s: float = ALIVE_TIMEOUT_S) -> bool:
    """Whether each of the prefill engine's processes that a decode engine would contact takes a connection.

    params: what `decode_params` returned. True if they name no address to try: then only the engine can tell.
    """
    dialled = [_connects(address, timeout_s) for address in _addresses(params)]
    return all(await asyncio.gather(*dialled))


def _addresses(params: dict[str, Any]) -> list[TcpAddress | UnixAddress]:
    """Of every process that would be contacted, the first address that can be tried."""
    found: list[TcpAddress | UnixAddress] = []
    if isinstance(workers := params.get("remote_addresses"), Sequence):
        with contextlib.suppress(msgspec.ValidationError):
            for addresses in msgspec.convert(workers, list[list[str]]):
                found += _dialable(addresses)[:1]
        return found
    host, port = params.get("remote_host"), params.get("remote_port")
    if isinstance(host, str) and isinstance(port, int) and host:
        found.append(TcpAddress(host, port))
    return found


def _dialable(addresses: list[str]) -> list[TcpAddress | UnixAddress]:
    found: list[TcpAddress | UnixAddress] = []
    for text in addresses:
        with contextlib.suppress(ValueError):
            if isinstance(address := parse_address(text), TcpAddress | UnixAddress):
                found.append(address)
    return found


async def _connects(address: TcpAddress | UnixAddress, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(address, TcpAddress):
                _, writer = await asyncio.open_connection(address.host, address.port)
            else:
                _, writer = await asyncio.open_unix_connection(address.path)
    except (OSError, ValueError, OverflowError):
        return False
    writer.transport.abort()
    return True


CallWorkers = Callable[[str, tuple[Any, ...]], Awaitable[Sequence[Any]]]
"""(method, arguments) -> each worker's answer; on AsyncLLM: `collective_rpc(method, args=arguments)`."""


async def release(
    client: TransportClient, transfer: dict[str, Any], *, call_workers: CallWorkers | None = None
) -> bool:
    """Nobody will fetch the blocks of this `PrefillResult.transfer`. True if the prefill engine has freed them, or had.

    client: proves the deployment's token. call_workers: of the prefill engine itself, for NIXL, whose workers listen to
    nobody else (`nixl_release.NixlRelease` must be its `worker_extension_cls`). False: the hold ends by itself.
    """
    try:
        parsed = msgspec.convert(transfer, VllmTransfer)
    except msgspec.ValidationError:
        return False
    if parsed.connector == STATOR_CONNECTOR:
        return await _release_ours(client, parsed)
    if parsed.connector == NIXL_CONNECTOR and call_workers is not None:
        return await _release_nixl(call_workers, parsed)
    return False


async def _release_ours(client: TransportClient, transfer: VllmTransfer) -> bool:
    try:
        source = msgspec.convert(transfer.params, LoadParams)
    except msgspec.ValidationError:
        return False

    async def at_worker(addresses: tuple[str, ...]) -> bool:
        target = Target(addresses, RELEASE_ENDPOINT, source.remote_instance_id)
        context = CallContext(RequestId(source.transfer_id), loop_time() + RELEASE_TIMEOUT_S)
        try:
            async with contextlib.aclosing(
                stream(client, target, ReleaseRequest(source.transfer_id), context=context)
            ) as answer:
                async for _ in answer:
                    pass
        except StatorError as error:
            logger.debug("releasing the KV blocks of %s: %r; they expire", source.transfer_id, error)
            return False
        return True

    return all(await asyncio.gather(*[at_worker(addresses) for addresses in source.remote_addresses]))


NUM_NIXL_TRIES = 4
"""Between two of them the engine core takes at least one step; a hold begins at the step after its prefill's."""


async def _release_nixl(call_workers: CallWorkers, transfer: VllmTransfer) -> bool:
    name = transfer.params.get("remote_request_id")
    if not isinstance(name, str):
        return False
    for _ in range(NUM_NIXL_TRIES):
        if all(await call_workers("stator_release_kv", (name,))):
            return True
    return False
