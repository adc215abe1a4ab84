from typing import Any

import pytest

from stator.core.resuming import NEVER_RESUMED, first_used, uses
from stator.engines.vllm.sampling import CANNOT_RESUME
from stator.messages.engine import SamplingParams


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({}, None),
        ({"seed": 5}, "seed"),
        ({"seed": 5, "temperature": 0.0}, None),
        ({"seed": 5, "seed_drawn": True}, None),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -0.1}, "frequency_penalty"),
        ({"repetition_penalty": 1.3, "top_p": 0.5, "min_tokens": 3, "stop_token_ids": (4,)}, None),
        ({"seed": 5, "presence_penalty": 1.0}, "seed"),
    ],
)
def test_what_vllm_cannot_resume(fields: dict[str, Any], used: str | None) -> None:
    assert first_used(SamplingParams(max_tokens=9, **fields), CANNOT_RESUME) == used


def test_max_tokens_is_used_by_all_and_unknown_fields_by_none() -> None:
    params = SamplingParams(max_tokens=9)
    assert uses(params, "max_tokens")
    assert not any(uses(params, field) for field in (*NEVER_RESUMED, "a_field_of_a_later_version"))
