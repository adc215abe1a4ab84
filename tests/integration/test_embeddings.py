"""/v1/embeddings on a model that computes: by OpenAI's own client, over HTTP, and beside requests that generate."""

import asyncio
import base64
import json
import math
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

import openai
from answers_world import MODEL, NUM_BLOCKS, World, local_engine, world
from front import until

from stator.config.models import resolve_model
from stator.engines.base import Engine
from stator.engines.local.numpy_runner import NumpyRunner
from stator.engines.sim.args import SimEngineArgs
from stator.engines.sim.engine import SimEngine
from stator.frontend.server import FrontendServer
from stator.messages.tokens import unpack
from unit.engines_local.pooled import mean_pooled

TEXTS = ["In the beginning was the word", "The sea is calm tonight. " * 20, "a"]


def run(test: Callable[[World], Awaitable[None]], *engines: Engine) -> None:
    async def main() -> None:
        async with asyncio.timeout(50), world(*engines) as made:
            await test(made)
            assert made.processor.num_open == 0

    asyncio.run(main())


async def vectors(made: World, **body: Any) -> list[list[float]]:
    answer = await made.post("/v1/embeddings", body)
    assert answer.status == 200, answer.body
    return [each["embedding"] for each in answer.json["data"]]


def test_openais_client_gets_the_mean_of_the_last_hidden_states() -> None:
    async def test(made: World) -> None:
        server = FrontendServer(made.app, host="127.0.0.1", port=0)
        await server.start()
        try:
            async with openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
            ) as client:
                # In base64, which it asks for by itself.
                packed = await client.embeddings.create(model=MODEL, input=TEXTS)
                plain = await client.embeddings.create(model=MODEL, input=TEXTS[0], encoding_format="float")
        finally:
            await server.stop()
        prompts = [unpack(made.tokenizer.encode(text, add_special_tokens=True)) for text in TEXTS]
        runner = NumpyRunner(resolve_model(MODEL), block_size=16, num_blocks=32)
        assert [each.index for each in packed.data] == [0, 1, 2]
        for each, prompt in zip(packed.data, prompts, strict=True):
            expected = mean_pooled(runner, prompt)
            assert len(each.embedding) == len(expected)
            assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(each.embedding, expected, strict=True))
        assert plain.data[0].embedding == packed.data[0].embedding
        num_tokens = sum(map(len, prompts))
        assert (packed.usage.prompt_tokens, packed.usage.total_tokens) == (num_tokens, num_tokens)
        assert (packed.object, packed.data[0].object, packed.model) == ("list", "embedding", MODEL)

    run(test)


def test_token_ids_are_texts_and_lists_keep_their_order() -> None:
    async def test(made: World) -> None:
        texts = [f"The number {n}" for n in range(70)]
        ids = [unpack(made.tokenizer.encode(text, add_special_tokens=True)) for text in texts]
        found = await vectors(made, input=ids)
        assert len(found) == 70
        assert found[:3] + found[-3:] == await vectors(made, input=texts[:3] + texts[-3:])
        assert await vectors(made, input=ids[5]) == [found[5]]
        cut = await vectors(made, input=texts[5], truncate_prompt_tokens=3)
        assert cut == await vectors(made, input=ids[5][:3])

    run(test)


def test_what_is_refused_is_named() -> None:
    async def test(made: World) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({"input": "a", "dimensions": 2}, "dimensions"),
            ({"input": "a", "dimensions": 0}, "dimensions"),
            ({"input": ["a", "b" * 3000]}, "input"),
            ({"input": []}, "input"),
            ({"input": ["a", 1]}, "input"),
            ({"input": [[1], []]}, "input"),
            ({"input": ["a"] * 2049}, "input"),
            ({"input": [10**6]}, "input"),
            ({"input": "a", "encoding_format": "bytes"}, "encoding_format"),
            ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
            ({"input": "a", "use_activation": False}, "use_activation"),
            ({"input": "a", "cache_salt": ""}, "cache_salt"),
        ]
        for body, param in cases:
            answer = await made.post("/v1/embeddings", body)
            assert (answer.status, answer.error["param"]) == (400, param), body
        assert not any(worker.bench.engine.load().num_blocks_used for worker in made.workers)

    run(test)


def test_an_instance_that_is_lost_gives_its_inputs_to_another() -> None:
    async def test(made: World) -> None:
        expected = await vectors(made, input=TEXTS)
        made.workers[0].dies_after = 0
        assert await vectors(made, input=TEXTS) == expected
        assert len(made.workers[1].embedded) >= len(TEXTS)

    run(test, local_engine(), local_engine())


def test_a_client_that_leaves_costs_nothing_more() -> None:
    async def test(made: World) -> None:
        client = made.client()
        body = json.dumps({"model": MODEL, "input": ["The sea " * 100] * 500}).encode()
        asked = asyncio.create_task(client.request("POST", "/v1/embeddings", body))
        (worker,) = made.workers
        await until(lambda: worker.embedded)
        client.leave()
        await asked
        assert client.answer.status == 0
        await until(lambda: made.processor.num_open == 0)
        engine: Any = worker.bench.engine
        await until(lambda: not engine._embeddings._open)
        assert len(worker.embedded) < 100

    run(test)


def test_streams_go_on_beside_long_inputs() -> None:
    async def test(made: World) -> None:
        alone = await made.complete(temperature=0)
        long = asyncio.create_task(vectors(made, input=["The sea " * 150] * 8))
        await until(lambda: made.workers[0].embedded)
        beside = await made.complete(temperature=0)
        assert not long.done(), "an answer of a few tokens waits for no input's end"
        assert beside["choices"] == alone["choices"]
        assert len(await long) == 8
        assert made.workers[0].bench.info.num_blocks == NUM_BLOCKS

    run(test)


def test_an_engine_without_embeddings_is_named() -> None:
    async def test(made: World) -> None:
        answer = await made.post("/v1/embeddings", {"input": "a"})
        assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "model", "unsupported")
        assert "sim" in answer.error["message"]

    args = SimEngineArgs(model=MODEL, block_size=16, num_gpu_blocks_override=64, step_times="tiny-llama")
    run(test, SimEngine(args))


def test_base64_is_float32_little_endian() -> None:
    async def test(made: World) -> None:
        (plain,) = await vectors(made, input="a")
        (packed,) = await vectors(made, input="a", encoding_format="base64")
        assert array("f", base64.b64decode(packed)).tolist() == plain  # type: ignore[arg-type]

    run(test)
