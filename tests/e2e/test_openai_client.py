"""OpenAI's own client, as its users write it, against a deployment with a decode and a prefill worker."""

import asyncio
import json
import urllib.request
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import anthropic
import openai
import pydantic
import pytest
from test_graphs import Head

from stator.config.models import resolve_model
from stator.messages.tokens import unpack
from stator.processor import ModelTokenizer

pytestmark = pytest.mark.timeout(180)

MODEL = "tiny-llama"
QUESTION = "Tell me a story about a fox."


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    started = Head("graphs.disagg_router", tmp_path_factory.mktemp("state"))
    try:
        yield started
    finally:
        started.serve.stop()


@pytest.fixture(scope="module")
def client(head: Head) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{head.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_stream_says_what_the_answer_says(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], stop=".", temperature=0
    )
    assert answer.usage is not None and answer.usage.completion_tokens > 1
    assert answer.usage.prompt_tokens_details is not None
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        stop=".",
        temperature=0,
        stream_options={"include_usage": True},
    ) as stream:
        kinds = {event.type for event in stream}
        whole = stream.get_final_completion()
    assert "content.delta" in kinds and "content.done" in kinds
    assert whole.choices[0].message.content == answer.choices[0].message.content
    assert whole.choices[0].finish_reason == answer.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.total_tokens == answer.usage.total_tokens


def test_many_at_once_without_threads(head: Head) -> None:
    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{head.port}/v1", api_key="none") as client:

            async def ask(number: int) -> str | None:
                stream = await client.chat.completions.create(
                    model=MODEL,
                    messages=[
                        {"role": "developer", "content": "Be short."},
                        {"role": "user", "content": [{"type": "text", "text": f"Story {number}."}]},
                    ],
                    max_tokens=10,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

            return await asyncio.gather(*(ask(number) for number in range(20)))

    assert all(asyncio.run(ask_all()))


def test_choices_and_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": QUESTION}],
        n=3,
        seed=7,
        temperature=1.0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage is not None and answer.usage.completion_tokens == 24
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 8
        assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)
        said = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
        assert said.decode(errors="replace").startswith((choice.message.content or "").rstrip("\ufffd"))


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    texts = ["In the beginning God created", "And God said, Let there be"]
    tokenizer = ModelTokenizer.load(resolve_model(f"stator:{MODEL}"))
    as_ids = [list(unpack(tokenizer.encode(text, add_special_tokens=True))) for text in texts]
    by_text = client.completions.create(model=MODEL, prompt=texts, max_tokens=6, temperature=0, echo=True)
    by_ids = client.completions.create(model=MODEL, prompt=as_ids, max_tokens=6, temperature=0)
    assert [choice.index for choice in by_text.choices] == [0, 1]
    for text, echoed, plain in zip(texts, by_text.choices, by_ids.choices, strict=True):
        assert echoed.text == text + plain.text


def test_what_cannot_be_done_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], modalities=["text", "audio"]
        )
    assert refused.value.param == "modalities"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": QUESTION}])


def test_anthropics_client_on_the_same_deployment(head: Head, client: openai.OpenAI) -> None:
    question: list[anthropic.types.MessageParam] = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], stop=".", temperature=0
    )
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{head.port}", api_key="none", max_retries=0) as other:
        with other.messages.stream(
            model=MODEL, messages=question, max_tokens=100, stop_sequences=["."], extra_body={"temperature": 0}
        ) as stream:
            message = stream.get_final_message()
        counted = other.messages.count_tokens(model=MODEL, messages=question)
    (block,) = message.content
    assert block.type == "text" and block.text == answer.choices[0].message.content
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")
    assert answer.usage is not None and counted.input_tokens == answer.usage.prompt_tokens


class Mood(pydantic.BaseModel):
    mood: Literal["calm", "cross"]
    age: Annotated[int, pydantic.Field(ge=0, le=99)]


class look(pydantic.BaseModel):  # noqa: N801: the name of a function
    """Look at something."""

    at: Literal["sea", "moon"]


def test_parse_gives_objects(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_format=Mood, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Mood)
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], response_format=Mood, max_tokens=60, seed=4
    ) as stream:
        assert any(event.type == "content.delta" for event in stream)
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Mood)


def test_parse_gives_the_arguments_of_forced_calls(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(look)]
    forced: dict[str, Any] = {"tools": tools, "tool_choice": "required", "max_tokens": 60, "parallel_tool_calls": False}
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.parse(model=MODEL, messages=messages, **forced)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert answer.choices[0].finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, look)
    with client.chat.completions.stream(model=MODEL, messages=messages, **forced) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    assert isinstance(streamed.function.parsed_arguments, look)


def test_tokens_are_counted_as_a_prompt_of_them_is(client: openai.OpenAI, head: Head) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    counted = post(head, "/tokenize", {"model": MODEL, "messages": messages})
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)  # type: ignore[arg-type]
    assert answer.usage is not None and answer.usage.prompt_tokens == counted["count"] == len(counted["tokens"])
    again = client.completions.create(model=MODEL, prompt=counted["tokens"], max_tokens=1)
    assert again.usage is not None and again.usage.prompt_tokens == counted["count"]
    assert QUESTION in post(head, "/detokenize", {"model": MODEL, "tokens": counted["tokens"]})["prompt"]


def test_the_document_of_the_api_is_served(head: Head) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{head.port}/openapi.json", timeout=30) as answer:
        assert json.load(answer)["paths"].keys() >= {"/v1/chat/completions", "/tokenize", "/detokenize"}


def post(head: Head, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{head.port}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
