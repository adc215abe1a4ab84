from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.messages.engine import SamplingParams
from stator.messages.openai import ChatCompletionRequest, ChatMessage, CompletionRequest, StreamOptions
from stator.messages.tools import ResponseFormat
from stator.processor import validation
from stator.processor.validation import SamplingDefaults


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", messages=[ChatMessage("user", "x")], **fields)


def completion(prompt: Any = "x", **fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", prompt=prompt, **fields)


def refusal(check: Any, *arguments: Any) -> StatorError:
    with pytest.raises(StatorError) as caught:
        check(*arguments)
    return caught.value


def params(request: Any, max_tokens: int = 10) -> SamplingParams:
    return validation.sampling_params(
        request, defaults=SamplingDefaults(), max_tokens=max_tokens, stop_ids=(), draw_seed=lambda: 77
    )


def test_an_unknown_model_lists_the_known_ones() -> None:
    error = refusal(validation.check_model, chat(), ("tiny", "alias"))
    assert error.code is ErrorCode.MODEL_NOT_FOUND and "tiny, alias" in error.message
    validation.check_model(chat(), ("tiny", "m"))


@pytest.mark.parametrize(
    ("field", "low", "high", "outside"),
    [
        ("temperature", 0.0, 2.0, [-0.1, 2.1, float("nan"), float("inf")]),
        ("top_p", 0.01, 1.0, [0.0, 1.1]),
        ("top_k", -1, 100, [-2, 2**31]),
        ("min_p", 0.0, 1.0, [-0.1, 1.1]),
        ("presence_penalty", -2.0, 2.0, [-2.1, 2.1]),
        ("frequency_penalty", -2.0, 2.0, [-2.1, 2.1]),
        ("repetition_penalty", 0.1, 10.0, [0.0, -1.0, float("inf")]),
        ("seed", -(2**63), 2**63 - 1, [-(2**63) - 1, 2**63]),
        ("min_tokens", 0, 100, [-1]),
        ("max_tokens", 1, 100, [0, -1]),
        ("max_completion_tokens", 1, 100, [0]),
        ("priority", -5, 5, [2**31]),
    ],
)
def test_ranges_name_the_field(field: str, low: Any, high: Any, outside: list[Any]) -> None:
    for value in (low, high, None):
        validation.check_ranges(chat(**{field: value}))
    for value in outside:
        error = refusal(validation.check_ranges, chat(**{field: value}))
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, field)
        assert field in error.message and str(value) in error.message


def test_an_empty_cache_salt() -> None:
    assert refusal(validation.check_ranges, chat(cache_salt="")).param == "cache_salt"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(modalities=["text", "audio"]), "modalities"),
        (chat(audio={"voice": "x"}), "audio"),
        (chat(functions=[{"name": "f"}]), "functions"),
        (completion(best_of=2), "best_of"),
        (completion(suffix="x"), "suffix"),
        (chat(verbosity="high"), "verbosity"),
        (chat(prompt_cache_retention="24h"), "prompt_cache_retention"),
        (chat(web_search_options={}), "web_search_options"),
        (
            chat(stream=True, stream_options=StreamOptions(include_obfuscation=True)),
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(request_: Any, param: str) -> None:
    error = refusal(validation.check_supported, request_)
    assert (error.code, error.param) == (ErrorCode.UNSUPPORTED, param)
    assert error.message.startswith(f"{param} is not supported: leave it out")


def test_the_advice_says_which_value_is_harmless() -> None:
    error = refusal(validation.check_supported, chat(modalities=["audio"]))
    assert error.message.endswith('or set it to ["text"].')


@pytest.mark.parametrize(
    "request_",
    [
        chat(
            n=1,
            logprobs=False,
            tools=[],
            tool_choice="none",
            response_format=ResponseFormat("text"),
            modalities=["text"],
        ),
        chat(logit_bias={}, service_tier="auto", store=False, user="u", metadata={"a": "b"}),
        completion(best_of=1, echo=False, suffix=""),
        chat(stream=True, stream_options=StreamOptions(include_usage=True)),
    ],
)
def test_what_asks_for_nothing_passes(request_: Any) -> None:
    validation.check_supported(request_)


def test_zero_choices_and_stream_options_without_a_stream() -> None:
    assert refusal(validation.check_ranges, chat(n=0)).param == "n"
    error = refusal(validation.check_supported, chat(stream_options=StreamOptions(include_usage=True)))
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "stream_options")


def test_stop_strings() -> None:
    assert validation.stop_strings(chat()) == ()
    assert validation.stop_strings(chat(stop="a")) == ("a",)
    assert validation.stop_strings(chat(stop=["a"] * 16)) == ("a",) * 16
    for bad in (["a"] * 17, [""], "", ["a" * 257]):
        error = refusal(validation.stop_strings, chat(stop=bad))
        assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "stop")


def test_stop_token_ids_are_of_the_vocabulary() -> None:
    assert validation.stop_token_ids(chat(stop_token_ids=[0, 9]), 10) == (0, 9)
    error = refusal(validation.stop_token_ids, chat(stop_token_ids=[3, 10]), 10)
    assert error.param == "stop_token_ids" and "10" in error.message


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a"], ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_in_all_their_spellings(prompt: Any, expected: Any) -> None:
    assert validation.prompts(completion(prompt), 10) == expected


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, 10], [1, "a"], ["a", ""], [[1], []], [[1], [10]]])
def test_prompts_that_are_refused(prompt: Any) -> None:
    error = refusal(validation.prompts, completion(prompt), 10)
    assert (error.code, error.param) == (ErrorCode.INVALID_REQUEST, "prompt")


def test_choices_are_bounded_together() -> None:
    assert len(validation.prompts(completion(["a"] * 128, n=4), 10)) == 128
    assert refusal(validation.prompts, completion(["a"] * 129, n=4), 10).param == "n"
    error = refusal(validation.prompts, completion(["a"] * 513), 10)
    assert error.param == "prompt" and "512" in error.message


def test_what_goes_together() -> None:
    assert refusal(validation.check_ranges, chat(top_logprobs=2)).param == "top_logprobs"
    validation.check_ranges(chat(top_logprobs=0))
    validation.check_ranges(chat(logprobs=True, top_logprobs=20))
    assert refusal(validation.check_supported, chat(prompt_logprobs=0, stream=True)).param == "prompt_logprobs"
    assert refusal(validation.check_supported, completion(logprobs=21)).param == "logprobs"
    assert refusal(validation.check_supported, completion(logprobs=-1)).param == "logprobs"
    validation.check_supported(completion(best_of=3, n=3))
    assert refusal(validation.check_supported, completion(best_of=3, n=2)).param == "best_of"


def test_no_tokens_may_be_asked_for_only_with_echo() -> None:
    validation.check_ranges(completion(max_tokens=0, echo=True))
    assert refusal(validation.check_ranges, completion(max_tokens=0)).param == "max_tokens"
    assert validation.resolve_max_tokens(completion(max_tokens=0, echo=True), 40, 100) == 1


def test_logit_bias() -> None:
    assert validation.logit_bias(chat(), 10) == ()
    assert validation.logit_bias(chat(logit_bias={"3": -100, "9": 0.5}), 10) == ((3, -100), (9, 0.5))
    keys, values = ("x", "-1", "10", "\u0663", "9" * 5000), (101.0, -101.0, float("nan"))
    for bad in [{key: 1.0} for key in keys] + [{"1": value} for value in values]:
        assert refusal(validation.logit_bias, chat(logit_bias=bad), 10).param == "logit_bias"
    many = {str(token_id): 0.0 for token_id in range(1025)}
    assert refusal(validation.logit_bias, chat(logit_bias=many), 2000).param == "logit_bias"


def test_allowed_token_ids() -> None:
    assert validation.allowed_token_ids(chat(), 10, {2}) == ()
    assert validation.allowed_token_ids(chat(allowed_token_ids=[3, 1, 3]), 10, {2}) == (3, 1)
    assert validation.allowed_token_ids(chat(allowed_token_ids=[2]), 10, {2}) == (2,)
    for fields in ({"allowed_token_ids": []}, {"allowed_token_ids": [10]}, {"allowed_token_ids": [2], "min_tokens": 1}):
        assert refusal(validation.allowed_token_ids, chat(**fields), 10, {2}).param == "allowed_token_ids"


def test_each_choice_has_a_seed_of_its_own() -> None:
    first = params(chat(seed=2**63 - 1))
    assert validation.for_choice(first, 0) is first
    assert [validation.for_choice(first, nth).seed for nth in (1, 2)] == [-(2**63), -(2**63) + 1]
    greedy = params(chat(temperature=0))
    assert validation.for_choice(greedy, 3) is greedy
    drawn = validation.for_choice(params(chat()), 2)
    assert (drawn.seed, drawn.seed_drawn) == (79, True)


def test_absent_max_tokens() -> None:
    assert validation.resolve_max_tokens(chat(), 40, 100) == 60
    assert validation.resolve_max_tokens(completion(), 40, 100) == 16
    assert validation.resolve_max_tokens(completion(), 90, 100) == 10


def test_max_completion_tokens_wins() -> None:
    assert validation.resolve_max_tokens(chat(max_tokens=5, max_completion_tokens=7), 40, 100) == 7


def test_what_does_not_fit_says_both_numbers_and_the_limit() -> None:
    error = refusal(validation.resolve_max_tokens, chat(max_tokens=61), 40, 100)
    assert error.param == "max_tokens"
    assert error.message.startswith(
        "This model's maximum context length is 100 tokens; the prompt has 40 tokens and max_tokens asks for 61"
    )
    error = refusal(validation.resolve_max_tokens, chat(max_completion_tokens=61), 40, 100)
    assert error.param == "max_completion_tokens" and "max_completion_tokens asks for 61" in error.message
    assert validation.resolve_max_tokens(chat(max_tokens=60), 40, 100) == 60


def test_a_prompt_that_fills_the_context() -> None:
    for fields in ({}, {"max_tokens": 1}):
        error = refusal(validation.resolve_max_tokens, chat(**fields), 100, 100)
        assert error.param == "messages" and "100 tokens" in error.message
        assert "maximum context length is" in error.message and "prompt is too long" in error.message, "clients look"
        assert error.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED and error.info.status == 400
    assert refusal(validation.resolve_max_tokens, completion(), 0, 100).param == "prompt"


def test_sampling_params() -> None:
    request = chat(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=5, min_tokens=2, presence_penalty=1.0, ignore_eos=True
    )
    assert params(request) == SamplingParams(
        max_tokens=10,
        min_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=5,
        presence_penalty=1.0,
        ignore_eos=True,
    )


def test_a_sampled_request_always_has_a_seed_and_a_greedy_one_needs_none() -> None:
    assert params(chat()).seed == 77
    assert params(chat(temperature=0.0)).seed is None
    assert params(chat(seed=0)).seed == 0


def test_absent_fields_take_the_models_defaults() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)
    made = validation.sampling_params(
        chat(top_k=0), defaults=defaults, max_tokens=5, stop_ids=(4,), draw_seed=lambda: 1
    )
    assert (made.temperature, made.top_p, made.top_k, made.stop_token_ids) == (0.6, 0.9, 0, (4,))


def test_min_tokens_beyond_max_tokens() -> None:
    error = refusal(params, chat(min_tokens=11))
    assert error.param == "min_tokens" and "11" in error.message and "10" in error.message
