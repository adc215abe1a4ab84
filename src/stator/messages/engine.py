"""What travels between Processor, worker and engine.

All structs are frozen, so that a call in process may pass the object itself and still behave like one over a socket.
Unknown fields are ignored on decoding: a newer peer may add fields.
"""

from enum import StrEnum
from typing import Any

import msgspec

from stator.ids import InstanceId, JobId, RequestId
from stator.messages.grammar import Grammar
from stator.messages.tokens import EMPTY, TokenBuffer


class FinishReason(StrEnum):
    """Why an engine stopped a sequence. Everything else that ends a stream is an error."""

    STOP = "stop"
    LENGTH = "length"


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an engine picks tokens. Stop *strings* are not here: the Processor matches text and aborts.

    max_tokens: output tokens, those in `resume_ids` included. min_tokens: no eos or stop token before that many.
    temperature 0 is greedy. top_k 0 and top_p 1.0 are off. seed: None means the engine draws one. seed_drawn: the
    request asked for none; this one was drawn so that another engine could go on with it, and may be passed over.
    Penalties follow vLLM: presence and frequency over output tokens, repetition over prompt and output.
    logprobs, prompt_logprobs: how many alternatives are told with each token of the output, of the prompt; 0: that of
    the token alone, None: nothing. logit_bias: (token id, what is added to its logit). allowed_token_ids: no others may
    come; empty: all may. grammar: what the output must be, up to its stop token or its last token.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed_drawn: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    grammar: Grammar | None = None


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One sequence to generate.

    resume_ids: output tokens that an earlier attempt already delivered. They are computed like prompt tokens, but
    counted as output: penalties, min and max tokens, seed position and usage see them as generated (DESIGN.md,
    "Continuing a request").
    transfer: opaque parameters made by a prefill engine; the engine fetches the KV blocks they describe instead of
    computing them. Only engines look inside.
    """

    request_id: RequestId
    prompt_ids: TokenBuffer
    sampling: SamplingParams
    resume_ids: TokenBuffer = EMPTY
    priority: int = 0
    cache_salt: str | None = None
    lora_name: str | None = None
    transfer: dict[str, Any] | None = None


LOWEST_LOGPROB = -9999.0
"""For a token that cannot come: JSON has no infinity."""


class TokenScore(msgspec.Struct, frozen=True, array_like=True):
    """How likely a token was, by the model's own logits, before temperature, penalties and limits.

    logprob: natural logarithm of its probability. rank: 1 for the likeliest. top_ids, top_logprobs: the likeliest, best
    first, as many as were asked for; the token may be among them.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class TokenDelta(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """Tokens that one engine step, or several merged ones, added to a sequence.

    finish_reason: set on the last delta only; the stream then ends without error.
    num_cached_tokens: on the first delta: prompt tokens found in the engine's own prefix cache. Tokens fetched from
    a prefill worker are not counted here (`num_transferred_tokens`), except those which that worker had cached.
    scores: one for each of token_ids, if asked for. prompt_scores: on the first delta, one for each prompt token but
    the first, if asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int | None = None
    num_transferred_tokens: int = 0
    scores: list[TokenScore] | None = None
    prompt_scores: list[TokenScore] | None = None


class PrefillResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """A finished prefill whose blocks wait to be fetched.

    transfer: what the decode engine needs, opaque. num_cached_tokens: prompt tokens the prefill engine had cached.
    """

    transfer: dict[str, Any]
    num_prompt_tokens: int
    num_cached_tokens: int = 0


class EngineInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """Capacity and identity of a started engine. Published with the instance.

    block_size: tokens. num_blocks: KV blocks that sequences may use. max_model_len: prompt and output tokens.
    pairing: prefill and decode instances exchange KV blocks only if these are equal (block size, KV dtype, model
    fingerprint, engine version, connector).
    cannot_resume: sampling fields with which a request of this engine cannot be continued from resume_ids.
    cannot: sampling fields that it does not have at all; a request that uses one is refused.
    can_embed: it makes embeddings (`messages.embeddings`).
    model_id, device: what was loaded, as configured, and what it computes on, e.g. `8 x NVIDIA H100 80GB HBM3`; by them
    the router finds how long steps take. Empty if not known.
    steps_while_waiting: it makes steps also when all that it has waits for blocks to be fetched.
    """

    engine: str
    version: str
    model: str
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    pairing: dict[str, str] = {}
    cannot_resume: tuple[str, ...] = ()
    model_id: str = ""
    device: str = ""
    steps_while_waiting: bool = False
    cannot: tuple[str, ...] = ()
    can_embed: bool = False


class EngineLoad(msgspec.Struct, frozen=True, omit_defaults=True):
    """A reading of an engine. `*_total` counters only grow; rates are differences taken by the reader.

    prompt_tokens_computed_total: computed here, recomputation after preemption included.
    prompt_tokens_cached_total / prompt_tokens_total: the prefix cache hit rate, each request counted once, at its
    first schedule. prompt_tokens_transferred_total: fetched from a prefill worker instead of computed.
    num_blocks_held: blocks of finished prefills that wait to be fetched (part of num_blocks_used).
    num_fetching: sequences that wait for their own blocks from a prefill engine (part of num_waiting).
    num_first_uses: what was begun and needs something that this engine has not done before: kernels may be compiled.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_blocks_used: int = 0
    num_blocks_held: int = 0
    prompt_tokens_total: int = 0
    prompt_tokens_cached_total: int = 0
    prompt_tokens_computed_total: int = 0
    prompt_tokens_transferred_total: int = 0
    generation_tokens_total: int = 0
    preemptions_total: int = 0
    steps_total: int = 0
    num_fetching: int = 0
    num_first_uses: int = 0


class BlocksStored(msgspec.Struct, frozen=True, omit_defaults=True, tag="stored"):
    """Blocks that may now be reused; block_hashes in order, each chained on the one before; parent of the first."""

    block_hashes: list[int]
    parent_hash: int | None = None


class BlocksRemoved(msgspec.Struct, frozen=True, tag="removed"):
    block_hashes: list[int]


class BlocksCleared(msgspec.Struct, frozen=True, tag="cleared"):
    pass


KvEvent = BlocksStored | BlocksRemoved | BlocksCleared


class PrefillJob(msgspec.Struct, frozen=True, omit_defaults=True):
    """A prompt to prefill for a decode worker; the payload of the prefill queue.

    pairing: the decode engine's `EngineInfo.pairing`; a prefill worker with another one must not take the job.
    decode_instance and decode_addresses: whom to tell. adapter: `LoraAdapter.digest` of the decode engine's adapter; a
    prefill worker with another one must not take the job.
    """

    job_id: JobId
    request: EngineRequest
    decode_instance: InstanceId
    decode_addresses: tuple[str, ...]
    pairing: dict[str, str]
    adapter: str = ""


class PrefillDone(msgspec.Struct, frozen=True, omit_defaults=True):
    """From a prefill worker to the decode worker: result, or why there is none (`error`).

    crashed: its engine failed in a step that computed this job (ErrorCode.ENGINE_CRASHED).
    """

    job_id: JobId
    attempt: int
    prefill_instance: InstanceId
    result: PrefillResult | None = None
    error: str | None = None
    crashed: bool = False


class PrefillTaken(msgspec.Struct, frozen=True):
    """A prefill worker has taken a job. The decode worker keeps the call open, and ends it, without an item, when the
    job's result is wanted no more: work on it stops then."""

    job_id: JobId
    attempt: int
    prefill_instance: InstanceId


class PrefillDoneReply(msgspec.Struct, frozen=True):
    """accepted False: the request ended, was prefilled otherwise, or another attempt was first; release the blocks."""

    accepted: bool
