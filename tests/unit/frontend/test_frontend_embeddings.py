"""/v1/embeddings at the Frontend: what reaches the Processor, and the body that its vectors become."""

import asyncio
import base64
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from frontend_fakes import MODEL, Answer, AsgiClient, Fixture, ask, frontend
from openai.types import embedding_create_params as openai_params

from stator.errors import ErrorCode, StatorError
from stator.messages.embeddings import EMBEDDING_FIELDS, Embedding, EmbeddingsRequest
from stator.transport import Call

ONE, TWO = struct.pack("<2f", 0.5, -1.0), struct.pack("<2f", 0.1, 2.0)


def answer_with(*items: Embedding) -> Callable[[Call], None]:
    def script(call: Call) -> None:
        call.items(list(items))
        call.end()

    return script


# As they come: not in order.
both = answer_with(Embedding(TWO, 4, 1), Embedding(ONE, 3))


def run(test: Callable[[Fixture], Awaitable[None]], script: Callable[[Call], None] = both) -> None:
    async def main() -> None:
        async with frontend(script) as fe:
            await test(fe)
            assert fe.app.generation.num_open == 0

    asyncio.run(main())


def body(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "input": ["a", "b"], **fields}).encode()


def post(fe: Fixture, **fields: Any) -> Awaitable[Answer]:
    return ask(fe.app, "POST", "/v1/embeddings", body(**fields))


def test_the_body_is_openais_and_in_the_inputs_order():
    async def test(fe: Fixture) -> None:
        answer = await post(fe, user="u", other_vendors=1)
        assert answer.status == 200
        float32 = struct.unpack("<2f", TWO)
        assert answer.json == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [0.5, -1.0]},
                {"object": "embedding", "index": 1, "embedding": list(float32)},
            ],
            "model": MODEL,
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
        }
        (call,) = fe.calls
        assert call.request == EmbeddingsRequest(model=MODEL, input=["a", "b"], user="u")
        metrics = fe.metrics.render().decode()
        assert f'stator_requests_total{{code="200",endpoint="embeddings",model="{MODEL}"}} 1.0' in metrics
        assert f'stator_request_input_tokens_sum{{endpoint="embeddings",model="{MODEL}"}} 7.0' in metrics

    run(test)


def test_base64_is_asked_for():
    async def test(fe: Fixture) -> None:
        data = (await post(fe, encoding_format="base64")).json["data"]
        assert [base64.b64decode(each["embedding"]) for each in data] == [ONE, TWO]

    run(test)


@pytest.mark.parametrize("items", [(), (Embedding(TWO, 4, 1),)], ids=["none", "one is missing"])
def test_an_answer_without_all_vectors_is_none(items: tuple[Embedding, ...]):
    async def test(fe: Fixture) -> None:
        assert (await post(fe)).status == 502

    run(test, answer_with(*items))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": {}}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [[1], "a"]}, "input"),
        ({"input": [-1]}, "input[0]"),
        ({"input": [[1.5]]}, "input[0][0]"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"dimensions": "many"}, "dimensions"),
        ({"mm_processor_kwargs": {"a": 2**64}}, "mm_processor_kwargs"),
        ({"model": None}, "model"),
    ],
)
def test_bodies_that_are_none_are_refused_here(fields: dict[str, Any], param: str):
    async def test(fe: Fixture) -> None:
        answer = await post(fe, **fields)
        assert answer.status == 400 and answer.error["param"].startswith(param.split("[")[0])
        assert fe.calls == []

    run(test)


def test_what_the_processor_refuses_is_refused_in_its_words():
    async def test(fe: Fixture) -> None:
        answer = await post(fe)
        assert (answer.status, answer.error["param"], answer.error["message"]) == (400, "dimensions", "no")

    run(test, lambda call: call.end(StatorError(ErrorCode.UNSUPPORTED, "no", param="dimensions")))


def test_a_client_that_leaves_cancels_its_call():
    async def test(fe: Fixture) -> None:
        client = AsgiClient(fe.app)
        asked = asyncio.create_task(client.request("POST", "/v1/embeddings", body()))
        await fe.arrivals.get()
        client.leave()
        await fe.cancelled.get()
        await asked
        assert client.answer.status == 0
        assert 'stator_client_disconnects_total{endpoint="embeddings"} 1.0' in fe.metrics.render().decode()

    run(test, lambda call: None)


def test_the_table_has_every_field_of_openais_schema_and_of_the_request():
    ours = {each.name for each in EMBEDDING_FIELDS if not each.extension}
    assert ours == set(openai_params.EmbeddingCreateParams.__annotations__)
    assert {each.name for each in EMBEDDING_FIELDS} == set(EmbeddingsRequest.__struct_fields__)
