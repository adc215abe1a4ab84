"""What two engines say to each other about KV blocks.

A prefill engine holds the blocks of a finished prefill under a transfer id and serves them on two endpoints:
`kv.fetch` streams the asked blocks as pieces on the bulk lane, `kv.release` ends the hold. How the decode engine learns
of them (`PrefillResult.transfer`) is each engine's own.
"""

import hashlib

import msgspec

from stator.ids import TransferId
from stator.messages.engine import EngineRequest
from stator.messages.tokens import BYTES_PER_TOKEN

FETCH_ENDPOINT = "kv.fetch"
RELEASE_ENDPOINT = "kv.release"


class FetchRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Blocks first_block .. first_block + num_blocks - 1 of a held prefill.

    layout: what a block's bytes mean to the asker; a server whose blocks mean something else refuses. Empty where the
    engines' pairing says it all.
    """

    transfer_id: TransferId
    first_block: int
    num_blocks: int
    layout: str = ""


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
