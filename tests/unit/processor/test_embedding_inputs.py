"""Inputs of requests for embeddings: what is refused, what is cut, and how."""

from typing import Any

import pytest

from stator.errors import ErrorCode, StatorError
from stator.messages.embeddings import MAX_INPUTS, MAX_TOTAL_TOKENS, EmbeddingsRequest
from stator.messages.tokens import TokenBuffer, pack, unpack
from stator.processor.embedding_inputs import check, encoded, inputs, truncated

CONTEXT = 8


def encode(text: str, special: bool) -> TokenBuffer:
    ids = [ord(letter) - 96 for letter in text]
    return pack([100, *ids, 101] if special else ids)


def made(given: Any, **fields: Any) -> list[list[int]]:
    request = EmbeddingsRequest(model="m", input=given, **fields)
    check(request, ("m",), CONTEXT)
    return [unpack(each) for each in encoded(request, inputs(request, 200), encode, CONTEXT)]


def refusal(given: Any, **fields: Any) -> StatorError:
    with pytest.raises(StatorError) as refused:
        made(given, **fields)
    return refused.value


def test_texts_and_token_ids_one_or_several():
    assert made("ab") == [[100, 1, 2, 101]]
    assert made(["a", "b"]) == [[100, 1, 101], [100, 2, 101]]
    assert made([1, 2]) == [[1, 2]]
    assert made([[1], [2, 3]]) == [[1], [2, 3]]
    assert made("ab", add_special_tokens=False) == [[1, 2]]


@pytest.mark.parametrize(
    ("limit", "side", "expected"),
    [
        (4, None, [100, 1, 2, 101]),
        (4, "left", [100, 8, 9, 101]),
        (2, None, [100, 101]),
        (2, "left", [100, 101]),
        (1, None, [100]),
        (1, "left", [101]),
        (-1, None, [100, 1, 2, 3, 4, 5, 6, 101]),
    ],
)
def test_a_text_is_cut_between_its_special_tokens(limit: int, side: Any, expected: list[int]):
    assert made("abcdefghi", truncate_prompt_tokens=limit, truncation_side=side) == [expected]


def test_what_is_short_enough_is_not_cut_and_ids_are_cut_as_they_are():
    assert made(["a", "abcd"], truncate_prompt_tokens=5) == [[100, 1, 101], [100, 1, 2, 3, 101]]
    assert made([1, 2, 3, 4], truncate_prompt_tokens=3) == [[1, 2, 3]]
    assert made([1, 2, 3, 4], truncate_prompt_tokens=3, truncation_side="left") == [[2, 3, 4]]


def test_ids_that_the_special_tokens_changed_are_cut_as_they_are():
    assert truncated([9, 9, 9], [1, 2], 2, keep_end=False) == [9, 9]
    assert truncated([9, 1, 9], [1, 2], 2, keep_end=True) == [1, 9]


@pytest.mark.parametrize(
    ("given", "fields", "param", "code"),
    [
        ("", {}, "input", ErrorCode.INVALID_REQUEST),
        (["a", ""], {}, "input", ErrorCode.INVALID_REQUEST),
        ([], {}, "input", ErrorCode.INVALID_REQUEST),
        ([1, "a"], {}, "input", ErrorCode.INVALID_REQUEST),
        ([200], {}, "input", ErrorCode.INVALID_REQUEST),
        (["a"] * (MAX_INPUTS + 1), {}, "input", ErrorCode.INVALID_REQUEST),
        ("abcdefg", {}, "input", ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ("a", {"dimensions": 0}, "dimensions", ErrorCode.INVALID_REQUEST),
        ("a", {"priority": 2**40}, "priority", ErrorCode.INVALID_REQUEST),
        ("a", {"cache_salt": ""}, "cache_salt", ErrorCode.INVALID_REQUEST),
        ("a", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ErrorCode.INVALID_REQUEST),
        ("a", {"truncate_prompt_tokens": CONTEXT + 1}, "truncate_prompt_tokens", ErrorCode.INVALID_REQUEST),
        ("a", {"messages": []}, "messages", ErrorCode.UNSUPPORTED),
        ("a", {"use_activation": False}, "use_activation", ErrorCode.UNSUPPORTED),
        ("a", {"embed_dtype": "float16"}, "embed_dtype", ErrorCode.UNSUPPORTED),
        ("a", {"endianness": "big"}, "endianness", ErrorCode.UNSUPPORTED),
        ("a", {"padding": "max_length"}, "padding", ErrorCode.UNSUPPORTED),
    ],
)
def test_what_is_wrong_is_named(given: Any, fields: dict[str, Any], param: str, code: ErrorCode):
    error = refusal(given, **fields)
    assert (error.param, error.code) == (param, code)


def test_what_is_too_long_is_told_in_the_words_that_clients_know():
    said = f"This model's maximum context length is {CONTEXT} tokens; "
    assert refusal("abcdefg").message.startswith(f"{said}input has 9.")
    assert refusal([[1], [1] * 10]).message.startswith(f"{said}input[1] has 10.")


def test_what_asks_for_nothing_passes():
    harmless: dict[str, Any] = {"use_activation": True, "embed_dtype": "float32", "padding": "do_not_pad"}
    assert made("a", endianness="little", mm_processor_kwargs={}, user="u", **harmless)


def test_all_inputs_together_are_bounded():
    many = [[5] * CONTEXT] * MAX_INPUTS
    assert len(made(many)) == MAX_INPUTS
    request = EmbeddingsRequest(model="m", input=[[5] * 1000] * (MAX_TOTAL_TOKENS // 1000 + 1))
    with pytest.raises(StatorError) as refused:
        encoded(request, inputs(request, 200), encode, 1000)
    assert refused.value.param == "input" and str(MAX_TOTAL_TOKENS) in refused.value.message


def test_another_model_is_not_found():
    with pytest.raises(StatorError) as refused:
        check(EmbeddingsRequest(model="x", input="a"), ("m", "n"), CONTEXT)
    assert (refused.value.code, refused.value.param) == (ErrorCode.MODEL_NOT_FOUND, "model")
    assert "m, n" in refused.value.message
