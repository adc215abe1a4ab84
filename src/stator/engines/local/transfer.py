"""What two local engines say to each other about KV blocks: the transfer parameters and the wire types.

A prefill engine holds the blocks of a finished prefill under a transfer id and serves them on two endpoints:
`kv.fetch` streams the asked blocks as pieces on the bulk lane, `kv.release` ends the hold.
"""

import hashlib
from typing import Any

import msgspec

from stator.ids import InstanceId, TransferId
from stator.messages.engine import EngineRequest
from stator.messages.tokens import BYTES_PER_TOKEN

CONNECTOR = "stator-request-plane-1"
FETCH_ENDPOINT = "kv.fetch"
RELEASE_ENDPOINT = "kv.release"


class TransferParams(msgspec.Struct, frozen=True):
    """`PrefillResult.transfer` of a local engine.

    num_tokens: leading tokens whose KV is held, in ceil(num_tokens / block size) blocks; the last may be partly filled.
    num_cached_tokens: of those, found in the prefill engine's prefix cache. digest: of those tokens (`digest_tokens`).
    """

    connector: str
    transfer_id: TransferId
    instance_id: InstanceId
    addresses: tuple[str, ...]
    num_tokens: int
    num_cached_tokens: int
    digest: str


class FetchRequest(msgspec.Struct, frozen=True):
    """Blocks first_block .. first_block + num_blocks - 1 of a held prefill."""

    transfer_id: TransferId
    first_block: int
    num_blocks: int


class BlockPiece(msgspec.Struct, frozen=True, array_like=True):
    """Bytes offset .. offset + len(data) - 1 of the num_bytes of one block; pieces of a block come in order."""

    block_index: int
    offset: int
    num_bytes: int
    data: bytes


class ReleaseRequest(msgspec.Struct, frozen=True):
    transfer_id: TransferId


def digest_tokens(request: EngineRequest, num_tokens: int) -> str:
    """Binds held blocks to the tokens, LoRA and cache salt they were computed for: they fit no other request.

    num_tokens: of prompt and resumed output, from the start.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(msgspec.msgpack.encode((request.lora_name, request.cache_salt)))
    digest.update((request.prompt_ids + request.resume_ids)[: num_tokens * BYTES_PER_TOKEN])
    return digest.hexdigest()


def parse_transfer(request: EngineRequest) -> TransferParams:
    """Raises ValueError, saying what is wrong, for parameters that this engine cannot use for this request."""
    try:
        params = msgspec.convert(request.transfer, TransferParams)
    except msgspec.ValidationError as error:
        raise ValueError(f"not transfer parameters of a local engine: {error}") from error
    if params.connector != CONNECTOR:
        raise ValueError(f"made for connector {params.connector}, this engine has {CONNECTOR}")
    held_bytes = params.num_tokens * BYTES_PER_TOKEN
    if not 0 < held_bytes <= len(request.prompt_ids) + len(request.resume_ids):
        raise ValueError(f"describes {params.num_tokens} tokens, which the request does not have")
    if params.digest != digest_tokens(request, params.num_tokens):
        raise ValueError("was computed for other tokens, LoRA or cache salt")
    return params


def as_dict(params: TransferParams) -> dict[str, Any]:
    return msgspec.to_builtins(params)
