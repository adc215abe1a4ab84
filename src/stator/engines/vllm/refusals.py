"""Requests that this engine cannot take, told before vLLM hears of them."""

from collections.abc import Collection

from stator.core.sequence_limits import cannot_embed, cannot_generate, cannot_truncate, validate, validate_embedding
from stator.engines.lora import not_loaded
from stator.engines.vllm.started import StartedVllm
from stator.errors import StatorError
from stator.messages.embeddings import EmbedRequest
from stator.messages.engine import EngineRequest


def generation_refusal(
    request: EngineRequest, llm: StartedVllm, *, supported: Collection[str], adapters: Collection[str]
) -> StatorError | None:
    """Of `generate` and `prefill`. supported: what vLLM says the model is for. adapters: those that are loaded."""
    if "generate" not in supported:
        return cannot_generate("vllm")
    if request.lora_name is not None and request.lora_name not in adapters:
        return not_loaded(request.lora_name, adapters)
    try:
        validate(request, llm.vocab_size, llm.max_model_len, llm.num_blocks, llm.block_size)
    except StatorError as error:
        return error
    return None


def embedding_refusal(request: EmbedRequest, llm: StartedVllm, *, supported: Collection[str]) -> StatorError | None:
    if "embed" not in supported:
        return cannot_embed("vllm")
    if request.dimensions is not None and not llm.has_dimensions(request.dimensions):
        return cannot_truncate("vllm", request.dimensions)
    try:
        validate_embedding(request, llm.vocab_size, llm.max_model_len)
    except StatorError as error:
        return error
    return None
