"""What answers say beside text, on a model that computes: judged by its own logits, taken another way."""

import asyncio
import functools
import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from answers_world import MODEL, World, local_engine, world
from front import until

from stator.config.models import resolve_model
from stator.engines.base import Engine
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.local.runner import Chunk
from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.engine import SimEngine

LONG = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness"


def run(test: Callable[[World], Awaitable[None]], *engines: Engine) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), world(*engines) as made:
            await test(made)

    asyncio.run(main())


@functools.cache
def reference() -> NumpyRunner:
    return NumpyRunner(resolve_model(MODEL), block_size=16, num_blocks=16)


def logprobs_of(token_ids: list[int]) -> Any:
    """[len - 1, vocab]: of what follows each token but the last."""
    rows = reference().logits([Chunk(tuple(range(16)), token_ids[:-1], 0, None)]).astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def test_chat_logprobs_are_those_of_the_model() -> None:
    async def test(made: World) -> None:
        body = await made.chat(
            logprobs=True, top_logprobs=3, return_token_ids=True, temperature=1.5, seed=3, frequency_penalty=1.0
        )
        (choice,) = body["choices"]
        prompt_ids, ids, content = body["prompt_token_ids"], choice["token_ids"], choice["logprobs"]["content"]
        assert len(content) == len(ids) == body["usage"]["completion_tokens"] == 12
        rows = logprobs_of([*prompt_ids, *ids])[len(prompt_ids) - 1 :]
        for token_id, entry, row in zip(ids, content, rows, strict=True):
            assert math.isclose(entry["logprob"], row[token_id], abs_tol=1e-6)
            best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:3]
            assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(row[best], abs=1e-6)
            assert bytes(entry["bytes"]) == made.tokenizer.token_bytes(token_id)
            assert entry["token"] == bytes(entry["bytes"]).decode("utf-8", "replace")
        assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
        assert choice["logprobs"]["refusal"] is None

    run(test)


def test_completions_with_echo_score_prompt_and_output() -> None:
    async def test(made: World) -> None:
        body = await made.complete(LONG, echo=True, logprobs=2, return_token_ids=True, temperature=0, max_tokens=5)
        (choice,) = body["choices"]
        prompt_ids, ids = choice["prompt_token_ids"], choice["token_ids"]
        told = choice["logprobs"]
        assert choice["text"].startswith(LONG) and len(ids) == 5
        lengths = {len(told[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        assert lengths == {len(prompt_ids) + 5}
        rows = logprobs_of([*prompt_ids, *ids])
        expected = [rows[at, token_id] for at, token_id in enumerate([*prompt_ids, *ids][1:])]
        assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
        assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-6)
        assert all(2 <= len(top) <= 3 for top in told["top_logprobs"][1:])
        # Each token stands in the text where its offset says.
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            shown = choice["text"][offset : offset + len(token)]
            assert shown == token or token.startswith("<") or "\ufffd" in token
        only = await made.complete(LONG, echo=True, logprobs=2, max_tokens=0)
        (prompt_only,) = only["choices"]
        assert (prompt_only["text"], prompt_only["finish_reason"]) == (LONG, "length")
        assert prompt_only["logprobs"]["token_logprobs"][1:] == told["token_logprobs"][1 : len(prompt_ids)]
        assert only["usage"]["completion_tokens"] == 0

    run(test)


def test_prompt_logprobs_are_by_id() -> None:
    async def test(made: World) -> None:
        body = await made.complete([5, 77, 300, 9], prompt_logprobs=1, temperature=0)
        (choice,) = body["choices"]
        first, *rest = choice["prompt_logprobs"]
        assert first is None and choice["logprobs"] is None
        rows = logprobs_of([5, 77, 300, 9])
        for row, entry, token_id in zip(rows, rest, [77, 300, 9], strict=True):
            own = entry[str(token_id)]
            assert own["logprob"] == pytest.approx(row[token_id], abs=1e-6)
            assert own["rank"] == 1 + int((row > row[token_id]).sum())
            assert min(each["rank"] for each in entry.values()) == 1
        assert len((await made.chat(prompt_logprobs=0))["prompt_logprobs"]) > 3

    run(test)


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("chat", {"logprobs": True, "top_logprobs": 2}),
        ("chat", {"n": 3, "logprobs": True, "return_token_ids": True, "temperature": 1.2, "seed": 9}),
        ("chat", {"n": 2, "stop": ["a", "e"], "logprobs": True, "temperature": 1.2, "seed": 4}),
        ("completions", {"prompt": [LONG, "The sea"], "n": 2, "logprobs": 1, "temperature": 1.0, "seed": 1}),
        ("completions", {"prompt": LONG, "echo": True, "logprobs": 0, "n": 2, "temperature": 1.0, "seed": 1}),
        ("completions", {"prompt": [[5, 6], [7, 8, 9]], "return_token_ids": True, "temperature": 0}),
        ("completions", {"prompt": "x", "echo": True, "max_tokens": 0}),
        ("completions", {"prompt": ["x"], "skip_special_tokens": False, "temperature": 2.0, "seed": 5}),
    ],
)
def test_a_stream_says_what_the_body_says(endpoint: str, fields: dict[str, Any]) -> None:
    async def test(made: World) -> None:
        ask = made.chat if endpoint == "chat" else made.complete
        whole = await ask(**fields)
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = await ask(**fields, stream=True, stream_options=options)
        *chunks, last = events
        assert last["choices"] == [] and [bool(event["choices"]) for event in chunks] == [True] * len(chunks)
        # The second finds in the cache what the first computed; the rest of the usage is the same.
        for usage in (whole["usage"], last["usage"]):
            del usage["prompt_tokens_details"]
        assert last["usage"] == whole["usage"]
        counts = [event["usage"]["completion_tokens"] for event in chunks]
        assert counts == sorted(counts) and counts[-1] == whole["usage"]["completion_tokens"]
        for choice in whole["choices"]:
            parts = [event["choices"][0] for event in chunks if event["choices"][0]["index"] == choice["index"]]
            assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
            if endpoint == "chat":
                assert parts[0]["delta"] == {"role": "assistant", "content": ""}
                text = "".join(part["delta"].get("content", "") for part in parts)
                assert text == choice["message"]["content"]
            else:
                assert "".join(part["text"] for part in parts) == choice["text"]
            told = [part["logprobs"] for part in parts if part["logprobs"] is not None]
            if choice["logprobs"] is None:
                assert told == []
            else:
                for name, values in choice["logprobs"].items():
                    if values is not None:
                        assert [value for each in told for value in each[name]] == values
            ids = [token_id for part in parts for token_id in part.get("token_ids", [])]
            assert ids == choice.get("token_ids", [])

    run(test)


def test_several_choices_differ_are_repeatable_and_share_their_prompt() -> None:
    async def test(made: World) -> None:
        fields: dict[str, Any] = {"temperature": 1.3, "max_tokens": 20}
        body = await made.complete(LONG, n=4, seed=100, **fields)
        texts = [choice["text"] for choice in body["choices"]]
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        assert len(set(texts)) == 4
        assert body["usage"]["completion_tokens"] == 80
        num_prompt = body["usage"]["prompt_tokens"]
        assert body["usage"]["total_tokens"] == num_prompt + 80
        load = made.workers[0].bench.engine.load()
        assert load.prompt_tokens_computed_total < num_prompt + 4 * 16, "the others find its blocks"
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        again = await made.complete(LONG, n=4, seed=100, **fields)
        assert [choice["text"] for choice in again["choices"]] == texts
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= num_prompt - 16
        alone = await made.complete(LONG, seed=102, **fields)
        assert alone["choices"][0]["text"] == texts[2]
        free = await made.complete(LONG, n=3, **fields)
        assert len({choice["text"] for choice in free["choices"]}) == 3

    run(test)


def test_prompts_are_answered_in_their_order() -> None:
    async def test(made: World) -> None:
        prompts = [LONG, "The sea", "A"]
        body = await made.complete(prompts, n=2, temperature=0)
        alone = [(await made.complete(prompt, temperature=0))["choices"][0]["text"] for prompt in prompts]
        texts = [choice["text"] for choice in body["choices"]]
        assert texts == [text for text in alone for _ in range(2)]
        ids = await made.complete([[5, 6, 7]], temperature=0)
        assert ids["choices"] == (await made.complete([5, 6, 7], temperature=0))["choices"]

    run(test)


def test_a_choice_that_fails_validation_fails_the_request_before_anything_is_computed() -> None:
    async def test(made: World) -> None:
        answer = await made.post("/v1/completions", {"prompt": ["fine", "x" * 3000], "max_tokens": 4})
        assert answer.status == 400 and answer.error["param"] == "prompt"
        assert made.workers[0].requests == []

    run(test)


def test_bias_allowed_tokens_and_salt_reach_the_engine() -> None:
    async def test(made: World) -> None:
        forced = await made.complete(logit_bias={"77": 100}, return_token_ids=True, temperature=0)
        assert set(forced["choices"][0]["token_ids"]) == {77}
        allowed = await made.complete(allowed_token_ids=[8, 9], return_token_ids=True, seed=1)
        assert set(allowed["choices"][0]["token_ids"]) <= {8, 9}
        first = await made.complete(LONG, cache_salt="a", temperature=0)
        other = await made.complete(LONG, cache_salt="b", temperature=0)
        same = await made.complete(LONG, cache_salt="a", temperature=0)
        cached = [body["usage"]["prompt_tokens_details"]["cached_tokens"] for body in (first, other, same)]
        assert cached[:2] == [0, 0] and cached[2] > 0
        assert first["choices"] == other["choices"] == same["choices"]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_every_choice(stream: bool) -> None:
    async def test(made: World) -> None:
        client, engine = made.client(), made.workers[0].bench.engine
        body = {"model": MODEL, "prompt": LONG, "n": 6, "max_tokens": 400, "ignore_eos": True, "stream": stream}
        task = asyncio.ensure_future(client.request("POST", "/v1/completions", json.dumps(body).encode()))
        await until(lambda: engine.load().num_running == 6)
        client.leave()
        await task
        await until(lambda: engine.load().num_blocks_used == 0)
        assert made.processor.num_open == 0

    run(test)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3, "seed": 8, "temperature": 1.1},
        {"logprobs": 2, "echo": True, "temperature": 0},
        {"logprobs": 1, "logit_bias": {"77": 3.0, "5": -4.0}, "seed": 2, "return_token_ids": True},
        {"n": 2, "prompt_logprobs": 1, "logprobs": 1, "seed": 2},
    ],
)
def test_answers_go_on_after_the_death_of_their_worker(fields: dict[str, Any]) -> None:
    async def test(made: World) -> None:
        whole = await made.complete(LONG, **fields)
        assert not made.workers[1].requests
        made.workers[0].dies_after = 4
        body = await made.complete(LONG, **fields)
        resumed = [request for request in made.workers[1].requests if request.resume_ids]
        assert len(resumed) == fields.get("n", 1)
        assert body["choices"] == whole["choices"]
        assert body["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]

    run(test, local_engine(), local_engine())


def test_an_engine_without_logits_refuses_by_name_and_does_the_rest() -> None:
    engine = SimEngine(SimEngineArgs(model=MODEL, block_size=16, num_gpu_blocks_override=256, sim_speed=50.0))

    async def test(made: World) -> None:
        cases: dict[str, dict[str, Any]] = {
            "logprobs": {"echo": True, "logprobs": 0},
            "logit_bias": {"logit_bias": {"5": 1}},
            "prompt_logprobs": {"prompt_logprobs": 0},
            "allowed_token_ids": {"allowed_token_ids": [5]},
        }
        for name, fields in cases.items():
            answer = await made.post("/v1/completions", {"prompt": LONG, **fields})
            assert (answer.status, answer.error["param"]) == (400, name)
            assert "sim" in answer.error["message"]
        body = await made.complete([LONG, "b"], n=2, echo=True, return_token_ids=True)
        assert len(body["choices"]) == 4 and body["choices"][0]["text"].startswith(LONG)

    run(test, engine)


def test_ids_and_traces_reach_the_worker_and_come_back() -> None:
    async def test(made: World) -> None:
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
        body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()
        answer = await made.client().request(
            "POST", "/v1/chat/completions", body, headers={"x-request-id": "mine-1", **trace}
        )
        assert answer.status == 200 and answer.headers["x-request-id"] == "mine-1"
        (worker,) = made.workers
        assert worker.requests[-1].request_id.startswith("mine-1-")
        assert {name: worker.headers[-1][name] for name in trace} == trace

    run(test)
