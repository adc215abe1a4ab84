"""From an OpenAI request to sampling parameters: ranges, and what Stator does not do yet, refused by name.

Types are checked when the body is decoded (messages.openai); here are the checks that need values, the model's
vocabulary or its context. Every refusal names the field in `param`.
"""

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stator.errors import ConfigError, ErrorCode, StatorError
from stator.messages.engine import SamplingParams
from stator.messages.grammar import Grammar
from stator.messages.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    RequestFields,
    is_plain,
    shows_prompt_only,
    unsupported_field,
)
from stator.messages.openai_fields import UNSUPPORTED_UNLESS
from stator.messages.openai_limits import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BIAS,
    MAX_CHOICES,
    MAX_ID_DIGITS,
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    RANGES,
)
from stator.processor import model_files

Request = ChatCompletionRequest | CompletionRequest

DEFAULT_COMPLETION_TOKENS = 16


def _invalid(param: str, message: str) -> StatorError:
    return StatorError(ErrorCode.INVALID_REQUEST, message, param=param)


def _too_long(param: str, message: str) -> StatorError:
    return StatorError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message, param=param)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What an absent field means: the model's generation_config.json where it says, else OpenAI's value."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def load(cls, model_dir: Path) -> "SamplingDefaults":
        """Raises ConfigError for a value that no request could ask for either."""
        path = model_dir / model_files.GENERATION_CONFIG
        config = model_files.read_json(path)
        found: dict[str, Any] = {}
        for name, expected in RANGES.items():
            value = config.get(name)
            if name not in cls.__dataclass_fields__ or value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in expected:
                raise ConfigError(f"{path}: {name}: expected a number {expected.words}, found {value!r}")
            found[name] = max(int(value), 0) if name == "top_k" else float(value)
        return cls(**found)


def check_model(request: RequestFields, models: Sequence[str]) -> None:
    if request.model not in models:
        raise StatorError(
            ErrorCode.MODEL_NOT_FOUND,
            f"The model {request.model!r} does not exist. Models served here: {', '.join(models)}.",
            param="model",
        )


def check_supported(request: Request) -> None:
    """Refuses the first field that asks for something unsupported, and `stream_options` without a stream."""
    name = unsupported_field(request)
    if name == "best_of" and getattr(request, name) == (request.n or 1):
        name = None
    if name is not None:
        raise StatorError(ErrorCode.UNSUPPORTED, f"{name} is not supported: {_advice(name)}.", param=name)
    if not is_plain(request):
        _check_details(request)
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "stream_options is only allowed when stream is true")


def _check_details(request: Request) -> None:
    """What goes together of the fields that ask for more than text."""
    if request.prompt_logprobs is not None and request.stream:
        raise _invalid("prompt_logprobs", "prompt_logprobs is not available in a stream; leave out one of the two")
    if isinstance(request, CompletionRequest) and not 0 <= (request.logprobs or 0) <= MAX_TOP_LOGPROBS:
        raise _invalid("logprobs", f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}, not {request.logprobs}")


def _advice(name: str) -> str:
    values = [value for value in UNSUPPORTED_UNLESS.get(name, ()) if value not in ("", [], {})]
    spelled = " or ".join(msgspec.json.encode(value).decode() for value in values)
    return f"leave it out or set it to {spelled}" if values else "leave it out"


def _ranges_of(kind: type[Request]) -> tuple[Callable[[Request], tuple[Any, ...]], tuple[str, ...]]:
    """The values that have ranges, read in one call."""
    names = tuple(name for name in RANGES if name in kind.__struct_fields__)
    return operator.attrgetter(*names), names


_RANGES_OF = {kind: _ranges_of(kind) for kind in (ChatCompletionRequest, CompletionRequest)}


def check_ranges(request: Request) -> None:
    values, names = _RANGES_OF[type(request)]
    for name, value in zip(names, values(request), strict=True):
        if value is None:
            continue
        expected = RANGES[name]
        if value not in expected and not (name == "max_tokens" and value == 0 and shows_prompt_only(request)):
            raise _invalid(name, f"{name} must be {expected.words}, not {value}")
    if isinstance(request, ChatCompletionRequest) and request.top_logprobs and not request.logprobs:
        raise _invalid("top_logprobs", "top_logprobs needs logprobs to be true")
    if request.cache_salt == "":
        raise _invalid("cache_salt", "cache_salt must not be empty; leave it out to share the prefix cache")


def logit_bias(request: Request, num_ids: int) -> tuple[tuple[int, float], ...]:
    given = request.logit_bias
    if not given:
        return ()
    if len(given) > MAX_LOGIT_BIAS:
        raise _invalid("logit_bias", f"logit_bias takes at most {MAX_LOGIT_BIAS} token ids, not {len(given)}")
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_ID_DIGITS):
            raise _invalid("logit_bias", f"logit_bias: its keys are token ids, not {key[:32]!r}")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            message = f"logit_bias: a value must be between {-MAX_BIAS} and {MAX_BIAS}, not {bias}"
            raise _invalid("logit_bias", message)
        found[int(key)] = bias
    _check_in_vocabulary(list(found), num_ids, "logit_bias")
    return tuple(found.items())


def allowed_token_ids(request: Request, num_ids: int, ending_ids: Collection[int]) -> tuple[int, ...]:
    """ending_ids: that end an output; they alone cannot make one of min_tokens."""
    if request.allowed_token_ids is None:
        return ()
    ids = tuple(dict.fromkeys(request.allowed_token_ids))
    if not 1 <= len(ids) <= MAX_ALLOWED_TOKEN_IDS:
        raise _invalid("allowed_token_ids", f"allowed_token_ids takes 1 to {MAX_ALLOWED_TOKEN_IDS} ids, not {len(ids)}")
    _check_in_vocabulary(ids, num_ids, "allowed_token_ids")
    if request.min_tokens and all(token_id in ending_ids for token_id in ids):
        message = f"allowed_token_ids has only tokens that end the output, but min_tokens is {request.min_tokens}"
        raise _invalid("allowed_token_ids", message)
    return ids


def stop_strings(request: Request) -> tuple[str, ...]:
    stop = request.stop
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOP_STRINGS:
        raise _invalid("stop", f"stop takes at most {MAX_STOP_STRINGS} strings, not {len(stops)}")
    for item in stops:
        if not 1 <= len(item) <= MAX_STOP_CHARS:
            raise _invalid("stop", f"each stop string must have 1 to {MAX_STOP_CHARS} characters; one has {len(item)}")
    return stops


def stop_token_ids(request: Request, num_ids: int) -> tuple[int, ...]:
    ids = tuple(request.stop_token_ids or ())
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise _invalid("stop_token_ids", f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, not {len(ids)}")
    _check_in_vocabulary(ids, num_ids, "stop_token_ids")
    return ids


def prompts(request: CompletionRequest, num_ids: int) -> list[str | list[int]]:
    """One or more, each a text or token ids; none is empty."""
    given: Any = request.prompt
    several = isinstance(given, list) and bool(given) and isinstance(given[0], (str, list))
    found: list[str | list[int]] = given if several else [given]
    if len(found) * (request.n or 1) > MAX_CHOICES:
        raise _invalid(
            "prompt" if len(found) > MAX_CHOICES else "n",
            f"{len(found)} prompts with n {request.n or 1} are more choices than the {MAX_CHOICES} that one request "
            "may have: send several requests",
        )
    for index, prompt in enumerate(found):
        where = f"prompt[{index}]" if several else "prompt"
        if not prompt:
            raise _invalid("prompt", f"{where} must not be empty")
        if isinstance(prompt, list):
            if {type(token_id) for token_id in prompt} != {int}:
                raise _invalid("prompt", "prompt must be a text or a list of token ids, not a mixture")
            _check_in_vocabulary(prompt, num_ids, "prompt")
    return found


def _check_in_vocabulary(ids: list[int] | tuple[int, ...], num_ids: int, param: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < num_ids):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < num_ids)
        raise _invalid(param, f"{param}: token id {wrong} is not in the vocabulary (0 to {num_ids - 1})")


def resolve_max_tokens(request: Request, num_prompt_tokens: int, max_model_len: int) -> int:
    """Output tokens to generate at most; prompt and output together fit the context, or the request is refused."""
    chat = isinstance(request, ChatCompletionRequest)
    asked, param = request.max_tokens, "max_tokens"
    if chat and request.max_completion_tokens is not None:
        asked, param = request.max_completion_tokens, "max_completion_tokens"
    prompt_param = "messages" if chat else "prompt"
    if num_prompt_tokens == 0:
        raise _invalid(prompt_param, f"{prompt_param} must not be empty")
    if asked == 0:
        # An engine samples at least one token; it is not shown.
        asked = 1
    left = max_model_len - num_prompt_tokens
    # LiteLLM knows this failure by these first words, LangChain by "prompt is too long": openai-python, on which it is
    # built, does not put the code into an error's text.
    context = f"This model's maximum context length is {max_model_len} tokens"
    if left < 1:
        tokens = f"its {num_prompt_tokens} tokens leave no room for an answer"
        raise _too_long(prompt_param, f"{context}, and the prompt is too long: {tokens}. Shorten it.")
    if asked is not None and asked > left:
        asks = (
            f"the prompt has {num_prompt_tokens} tokens and {param} asks for {asked}, {asked - left} too many together"
        )
        raise _too_long(param, f"{context}; {asks}. Ask for at most {left}, or shorten the prompt.")
    if asked is not None:
        return asked
    return left if chat else min(left, DEFAULT_COMPLETION_TOKENS)


def sampling_params(
    request: Request,
    *,
    defaults: SamplingDefaults,
    max_tokens: int,
    stop_ids: tuple[int, ...],
    draw_seed: Callable[[], int],
    bias: tuple[tuple[int, float], ...] = (),
    allowed_ids: tuple[int, ...] = (),
    num_top: int | None = None,
    num_prompt_top: int | None = None,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Of a request that passed `check_ranges`. num_top, num_prompt_top: as in `AnswerOptions`.

    A sampled request without a seed gets one here: only then can another engine continue it as the first would have.
    """
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise _invalid("min_tokens", f"min_tokens is {min_tokens}, more than max_tokens, which is {max_tokens}")
    temperature = defaults.temperature if request.temperature is None else request.temperature
    draws = request.seed is None and temperature > 0
    top_k = defaults.top_k if request.top_k is None else max(request.top_k, 0)
    repetition = defaults.repetition_penalty if request.repetition_penalty is None else request.repetition_penalty
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=defaults.top_p if request.top_p is None else request.top_p,
        top_k=top_k,
        min_p=defaults.min_p if request.min_p is None else request.min_p,
        seed=draw_seed() if draws else request.seed,
        seed_drawn=draws,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=repetition,
        stop_token_ids=stop_ids,
        ignore_eos=request.ignore_eos,
        logprobs=num_top,
        prompt_logprobs=num_prompt_top,
        logit_bias=bias,
        allowed_token_ids=allowed_ids,
        grammar=grammar,
    )


def for_choice(sampling: SamplingParams, nth: int) -> SamplingParams:
    """Of the nth choice of a prompt, from 0: its seed is the first one's plus nth, within 64 bits, as vLLM does it."""
    if sampling.seed is None or not nth:
        return sampling
    seed = (sampling.seed + nth + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)
