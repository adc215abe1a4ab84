"""The local engine's transfer parameters: how a decode engine learns where blocks are, and whether they fit."""

from typing import Any

import msgspec

from stator.engines.transfer.messages import digest_tokens
from stator.ids import InstanceId, TransferId
from stator.messages.engine import EngineRequest
from stator.messages.tokens import BYTES_PER_TOKEN

CONNECTOR = "stator-request-plane-1"


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
