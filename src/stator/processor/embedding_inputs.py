"""What a request for embeddings asks of its engine: its inputs as token ids, checked and cut. Pure."""

from collections.abc import Callable, Sequence
from typing import Any

from stator.errors import ErrorCode, StatorError
from stator.messages.embeddings import MAX_INPUTS, MAX_TOTAL_TOKENS, EmbeddingsRequest, unsupported_field
from stator.messages.openai_limits import RANGES
from stator.messages.tokens import TokenBuffer, num_tokens, pack, unpack
from stator.processor.prompt_jobs import TextPrompt

Encode = Callable[[str, bool], TokenBuffer]
"""A text's token ids, with or without the special ones that the tokenizer adds."""


def check(request: EmbeddingsRequest, models: Sequence[str], max_model_len: int) -> None:
    """All but the inputs. Raises StatorError."""
    if request.model not in models:
        raise StatorError(
            ErrorCode.MODEL_NOT_FOUND,
            f"The model {request.model!r} does not exist. Models served here: {', '.join(models)}.",
            param="model",
        )
    name = unsupported_field(request)
    if name is not None:
        raise StatorError(ErrorCode.UNSUPPORTED, f"{name} is not supported: leave it out.", param=name)
    if request.dimensions is not None and request.dimensions < 1:
        raise _invalid("dimensions", f"dimensions is {request.dimensions}; it must be at least 1")
    if request.priority is not None and request.priority not in RANGES["priority"]:
        raise _invalid("priority", f"priority is {request.priority}; it must be {RANGES['priority'].words}")
    if request.cache_salt == "":
        raise _invalid("cache_salt", "cache_salt must not be empty; leave it out")
    limit = request.truncate_prompt_tokens
    if limit is not None and limit != -1 and not 1 <= limit <= max_model_len:
        raise _invalid(
            "truncate_prompt_tokens",
            f"truncate_prompt_tokens is {limit}; it must be -1, or 1 to the model's context of {max_model_len} tokens",
        )


def inputs(request: EmbeddingsRequest, num_ids: int) -> list[str | list[int]]:
    """One or more, each a text or token ids of the vocabulary; none is empty. Raises StatorError."""
    given: Any = request.input
    several = isinstance(given, list) and bool(given) and isinstance(given[0], (str, list))
    found: list[str | list[int]] = given if several else [given]
    if len(found) > MAX_INPUTS:
        raise _invalid("input", f"input has {len(found)} entries, more than {MAX_INPUTS}; send several requests")
    for index, each in enumerate(found):
        if not each:
            where = f"input[{index}]" if several else "input"
            raise _invalid("input", f"{where} must not be empty")
        if isinstance(each, list):
            if {type(token_id) for token_id in each} != {int}:
                raise _invalid("input", "input must be a text or a list of token ids, not a mixture")
            if max(each) >= num_ids:
                raise _invalid("input", f"input: token id {max(each)} is not in the vocabulary (0 to {num_ids - 1})")
    return found


def texts(request: EmbeddingsRequest, found: Sequence[str | list[int]]) -> list[TextPrompt]:
    """What `encoded` asks for. Of what may be cut it asks for the bare text too."""
    special = [request.add_special_tokens]
    if request.truncate_prompt_tokens is not None and request.add_special_tokens:
        special.append(False)
    return [TextPrompt(each, with_special) for each in found if isinstance(each, str) for with_special in special]


def encoded(
    request: EmbeddingsRequest, found: Sequence[str | list[int]], encode: Encode, max_model_len: int
) -> list[TokenBuffer]:
    """Token ids of each input, cut if that is asked for. Raises StatorError for what is too long, one or together."""
    left = max(MAX_TOTAL_TOKENS, max_model_len)
    limit = request.truncate_prompt_tokens
    if limit == -1:
        limit = max_model_len
    made: list[TokenBuffer] = []
    for index, each in enumerate(found):
        ids = pack(each) if isinstance(each, list) else encode(each, request.add_special_tokens)
        if limit is not None and num_tokens(ids) > limit:
            bare = encode(each, False) if isinstance(each, str) and request.add_special_tokens else ids
            ids = pack(truncated(unpack(ids), unpack(bare), limit, keep_end=request.truncation_side == "left"))
        count = num_tokens(ids)
        where = f"input[{index}]" if len(found) > 1 else "input"
        if not count:
            raise _invalid("input", f"{where} has no tokens")
        if count > max_model_len:
            # LiteLLM knows this failure by these first words; see validation.py.
            raise StatorError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"This model's maximum context length is {max_model_len} tokens; {where} has {count}. Shorten it, or "
                "use truncate_prompt_tokens.",
                param="input",
            )
        left -= count
        if left < 0:
            raise _invalid(
                "input", f"the inputs have more than {MAX_TOTAL_TOKENS} tokens together; send several requests"
            )
        made.append(ids)
    return made


def truncated(ids: list[int], bare: list[int], limit: int, *, keep_end: bool) -> list[int]:
    """bare: ids without the special tokens around them, which are kept as far as there is room."""
    num_special = len(ids) - len(bare)
    before = next((at for at in range(num_special + 1) if ids[at : at + len(bare)] == bare), None)
    if before is None or num_special > limit:
        return ids[-limit:] if keep_end else ids[:limit]
    room = limit - num_special
    kept = bare[len(bare) - room :] if keep_end else bare[:room]
    return ids[:before] + kept + ids[before + len(bare) :]


def _invalid(param: str, message: str) -> StatorError:
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)
