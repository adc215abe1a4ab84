"""Loaded by Schemathesis: its bodies reach a model that is served, and ask it for little.

Only what is valid becomes something else that is valid; what is meant to be refused stays so.
"""

import os
from typing import Any

import schemathesis

MODEL = os.environ["SERVED_MODEL"]
CAPS = {"max_tokens": 4, "max_completion_tokens": 4, "n": 3, "max_output_tokens": 4, "min_tokens": 3}
MAX_N = 128
MAX_INT32 = 2**31 - 1
MAX_PROMPTS = 512
MIN_TIMEOUT_S = 30.0
TIMEOUT = "x-request-timeout-s"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if isinstance(case.body, dict):
        ask_for_little(case.body, generates=case.path.startswith("/v1/"))
    if case.headers and TIMEOUT in case.headers:
        case.headers[TIMEOUT] = patient(case.headers[TIMEOUT])


def ask_for_little(body: dict[str, Any], *, generates: bool) -> None:
    if isinstance(body.get("model"), str):
        body["model"] = MODEL
    for name, cap in CAPS.items():
        value = body.get(name)
        if type(value) is int and cap < value <= (MAX_N if name == "n" else MAX_INT32):
            body[name] = cap
    if (
        generates
        and "messages" in body
        and body.get("max_tokens") is None
        and body.get("max_completion_tokens") is None
    ):
        body["max_tokens"] = CAPS["max_tokens"]
    if "input" in body and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = CAPS["max_tokens"]
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) <= MAX_PROMPTS and not any(isinstance(each, int) for each in prompt):
        body["prompt"] = prompt[:3]
    if isinstance(body.get("stream_options"), dict) and not body.get("stream"):
        body["stream"] = True


def patient(timeout_s: str) -> str:
    """A deadline that is long enough for an answer, where one was given."""
    try:
        return str(MIN_TIMEOUT_S) if 0 < float(timeout_s) < MIN_TIMEOUT_S else timeout_s
    except ValueError:
        return timeout_s
