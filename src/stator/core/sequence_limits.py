"""Which requests an engine can run at all, and when a sequence's output ends."""

from collections.abc import Sequence

from stator.errors import ErrorCode, StatorError
from stator.messages.embeddings import EmbedRequest
from stator.messages.engine import EngineRequest, FinishReason, SamplingParams
from stator.messages.tokens import BYTES_PER_TOKEN, TokenBuffer, num_tokens, unpack


def stop_reason(
    sampling: SamplingParams, output_ids: Sequence[int], eos_token_ids: frozenset[int]
) -> FinishReason | None:
    """Whether the output ends with its newest token.

    output_ids: all output, not empty. The token that ends a sequence is part of its output. A stop token counts only
    if at least `min_tokens` came before it, which is when samplers begin to allow it.
    """
    token_id = output_ids[-1]
    if len(output_ids) > sampling.min_tokens:
        is_eos = token_id in eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            return FinishReason.STOP
    return FinishReason.LENGTH if len(output_ids) >= sampling.max_tokens else None


def computes_whole_prompt(sampling: SamplingParams) -> bool:
    """Whether no cached or fetched block may stand for a part of the prompt: its own logits are wanted."""
    return sampling.prompt_logprobs is not None


def resumed_finish(request: EngineRequest, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """The finish reason of a request whose resume_ids already are its whole output; else None."""
    if not request.resume_ids:
        return None
    return stop_reason(request.sampling, unpack(request.resume_ids), eos_token_ids)


def validate(request: EngineRequest, vocab_size: int, max_model_len: int, num_blocks: int, block_size: int) -> None:
    """Raises StatorError(INVALID_REQUEST) for a request that can never run, with the numbers that do not fit."""
    num_prompt = _check_ids(request.prompt_ids, vocab_size, "prompt_ids")
    num_resumed = _check_ids(request.resume_ids, vocab_size, "resume_ids")
    if not num_prompt:
        raise _invalid("the prompt is empty; at least one token is needed", "prompt_ids")
    _check_sampling(request.sampling)
    _check_biased(request.sampling, vocab_size)
    max_tokens = request.sampling.max_tokens
    if num_resumed > max_tokens:
        raise _invalid(f"resume_ids has {num_resumed} tokens, more than max_tokens ({max_tokens})", "resume_ids")
    if num_prompt + max_tokens > max_model_len:
        raise _invalid(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, together {num_prompt + max_tokens}; "
            f"the model's context is {max_model_len} tokens. Shorten the prompt or lower max_tokens",
            "max_tokens",
        )
    # The last output token's KV is never computed.
    num_needed = -(-(num_prompt + max_tokens - 1) // block_size)
    if num_needed > num_blocks:
        raise _invalid(
            f"the prompt has {num_prompt} tokens and max_tokens is {max_tokens}, which needs {num_needed} KV blocks; "
            f"this engine has {num_blocks} of {block_size} tokens. Shorten the prompt or lower max_tokens",
            "max_tokens",
        )


def validate_embedding(request: EmbedRequest, vocab_size: int, max_model_len: int) -> None:
    """Raises as `validate`."""
    num_prompt = _check_ids(request.prompt_ids, vocab_size, "prompt_ids")
    if not num_prompt:
        raise _invalid("the input is empty; at least one token is needed", "input")
    if num_prompt > max_model_len:
        raise _invalid(f"the input has {num_prompt} tokens; the model's context is {max_model_len} tokens", "input")


def _check_ids(buffer: TokenBuffer, vocab_size: int, field: str) -> int:
    if len(buffer) % BYTES_PER_TOKEN:
        raise _invalid(f"{field} has {len(buffer)} bytes, which is no whole number of token ids", field)
    if buffer and (largest := max(unpack(buffer))) >= vocab_size:
        raise _invalid(f"{field} holds token id {largest}; the model's vocabulary has {vocab_size}", field)
    return num_tokens(buffer)


def _check_sampling(sampling: SamplingParams) -> None:
    checks = (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("min_tokens", 0 <= sampling.min_tokens <= sampling.max_tokens, f"0 to max_tokens ({sampling.max_tokens})"),
        ("temperature", 0.0 <= sampling.temperature < float("inf"), "0 or more"),
        ("top_p", 0.0 < sampling.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= -1, "0 or -1 (off), or more"),
        ("min_p", 0.0 <= sampling.min_p <= 1.0, "0 to 1"),
        ("presence_penalty", -2.0 <= sampling.presence_penalty <= 2.0, "-2 to 2"),
        ("frequency_penalty", -2.0 <= sampling.frequency_penalty <= 2.0, "-2 to 2"),
        ("logprobs", (sampling.logprobs or 0) >= 0, "0 or more"),
        ("prompt_logprobs", (sampling.prompt_logprobs or 0) >= 0, "0 or more"),
        ("repetition_penalty", 0.0 < sampling.repetition_penalty < float("inf"), "above 0"),
    )
    for field, fits, expected in checks:
        if not fits:
            raise _invalid(f"{field} is {getattr(sampling, field)}; it must be {expected}", field)


def _check_biased(sampling: SamplingParams, vocab_size: int) -> None:
    biased = tuple(token_id for token_id, _ in sampling.logit_bias)
    for field, ids in (("logit_bias", biased), ("allowed_token_ids", sampling.allowed_token_ids)):
        wrong = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
        if wrong is not None:
            raise _invalid(f"{field} holds token id {wrong}; the model's vocabulary has {vocab_size}", field)


def lacks(engine: str, field: str) -> StatorError:
    return StatorError(
        ErrorCode.UNSUPPORTED, f"the engine of this model ({engine}) cannot do {field}; leave it out", param=field
    )


def cannot_embed(engine: str) -> StatorError:
    return StatorError(
        ErrorCode.UNSUPPORTED, f"the engine of this model ({engine}) cannot make embeddings of it", param="model"
    )


def cannot_generate(engine: str) -> StatorError:
    return StatorError(
        ErrorCode.UNSUPPORTED,
        f"this model makes embeddings ({engine} engine, runner: pooling) and no text; use /v1/embeddings",
        param="model",
    )


def cannot_truncate(engine: str, dimensions: int) -> StatorError:
    message = f"the engine of this model ({engine}) cannot cut its embeddings to {dimensions} dimensions; leave it out"
    return StatorError(ErrorCode.UNSUPPORTED, message, param="dimensions")


def _invalid(message: str, param: str) -> StatorError:
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)
