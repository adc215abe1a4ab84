"""What an engine is asked for that it has not done before."""

import msgspec
import pytest

from stator.core.first_use import FirstUses, uses_of
from stator.ids import RequestId
from stator.messages.engine import EngineRequest, SamplingParams
from stator.messages.grammar import Regex
from stator.messages.tokens import pack


def request(*, lora_name: str | None = None, transfer: dict[str, str] | None = None, **fields: object) -> EngineRequest:
    sampling = msgspec.structs.replace(SamplingParams(max_tokens=7), **fields)
    return EngineRequest(RequestId("r"), pack([1, 2]), sampling, lora_name=lora_name, transfer=transfer)


@pytest.mark.parametrize(
    ("asked", "uses"),
    [
        (request(), {"random"}),
        (request(seed=3, seed_drawn=True), {"random"}),
        (request(seed=3), {"seeded"}),
        (request(temperature=0.0, seed=3), {"greedy"}),
        (request(max_tokens=9, stop_token_ids=(4,), ignore_eos=True), {"random"}),
        (request(logprobs=0, top_k=5, temperature=0.5), {"random", "logprobs", "top_k"}),
        (request(grammar=Regex("a"), presence_penalty=0.1), {"random", "grammar", "presence_penalty"}),
        (request(lora_name="a"), {"random", "lora"}),
        (request(transfer={"a": "b"}), {"random", "transfer"}),
    ],
)
def test_what_a_request_uses(asked: EngineRequest, uses: set[str]) -> None:
    assert uses_of(asked) == uses


def test_a_use_is_first_until_a_result_came_of_it() -> None:
    first = FirstUses()
    first.begin(1, frozenset({"random"}))
    first.begin(2, frozenset({"random"}))
    first.begin(3, frozenset({"random", "logprobs"}))
    assert first.num_open == 3
    first.made(2)
    assert first.num_open == 1, "what one showed holds for all who use no more"
    first.made(2)
    first.end(2)
    first.begin(4, frozenset({"random"}))
    assert first.num_open == 1
    first.made(3)
    first.begin(5, frozenset({"logprobs"}))
    assert first.num_open == 0


def test_who_ends_without_a_result_has_shown_nothing() -> None:
    first = FirstUses()
    first.begin(1, frozenset({"logprobs"}))
    first.end(1)
    assert first.num_open == 0
    first.begin(2, frozenset({"logprobs"}))
    assert first.num_open == 1
