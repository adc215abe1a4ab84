"""LangChain's ChatOpenAI and OpenAIEmbeddings as their users call them.

Arguments: the address that ends in /v1, the model, a question, another that follows it, and texts as a JSON list.
"""

import json
import sys
from typing import Annotated, Any, Literal

import openai
import tiktoken.registry
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from uses import run_all, use

_, URL, MODEL, QUESTION, AND_THEN, TEXTS = sys.argv


def model(**settings: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"temperature": 0, "max_tokens": 100, "max_retries": 0, **settings}
    return ChatOpenAI(base_url=URL, api_key="none", model=MODEL, **given)


class Mood(BaseModel):
    """How someone feels."""

    mood: Literal["calm", "cross"]
    age: Annotated[int, Field(ge=0, le=99)]


# strict: else LangChain's schema of a tool allows properties of any name, and the bundled model writes them.
@tool
def look(at: Literal["sea", "moon"]) -> str:
    """Look at something."""
    return f"The {at} is bright."


@use
def chat() -> Any:
    answer = model(max_tokens=12).invoke([SystemMessage("Be short."), HumanMessage(QUESTION)])
    return {"text": answer.content, "usage": answer.usage_metadata, "about": answer.response_metadata}


@use
def stream() -> Any:
    chunks = list(model(max_tokens=12, stream_usage=True).stream([SystemMessage("Be short."), HumanMessage(QUESTION)]))
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    return {"text": whole.content, "usage": whole.usage_metadata}


@use
async def batch() -> Any:
    answers = await model(max_tokens=8).abatch([f"Story {number}." for number in range(8)])
    return [answer.content for answer in answers]


@use
def probabilities() -> Any:
    answer = model(max_tokens=5).bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    return answer.response_metadata["logprobs"]["content"]


@use
def several_choices() -> Any:
    (choices,) = model(n=3, temperature=1, seed=7, max_tokens=8).generate([[HumanMessage(QUESTION)]]).generations
    return [choice.text for choice in choices]


@use
def json_schema() -> Any:
    mood = model().with_structured_output(Mood, method="json_schema").invoke(QUESTION)
    assert isinstance(mood, Mood)
    return mood.model_dump()


@use
def json_schema_streamed() -> Any:
    plain = {**Mood.model_json_schema(), "additionalProperties": False}
    *_, last = model().with_structured_output(plain, method="json_schema").stream(QUESTION)
    return last


@use
def function_calling() -> Any:
    both = (
        model().with_structured_output(Mood, method="function_calling", strict=True, include_raw=True).invoke(QUESTION)
    )
    assert isinstance(both, dict) and both["parsing_error"] is None, both
    return {"parsed": both["parsed"].model_dump(), "calls": both["raw"].tool_calls}


@use
def tools() -> Any:
    """A forced call, its result sent back, and the answer to that."""
    messages: list[Any] = [HumanMessage(QUESTION)]
    called = model().bind_tools([look], tool_choice="required", strict=True, parallel_tool_calls=False).invoke(messages)
    (call,) = called.tool_calls
    result = look.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = model().bind_tools([look], tool_choice="none").invoke([*messages, called, result])
    return {"call": call, "result": result.content, "answer": answer.content, "calls_again": answer.tool_calls}


@use
def tools_streamed() -> Any:
    chunks = list(model().bind_tools([look], tool_choice="look", strict=True).stream(QUESTION))
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    return {"calls": whole.tool_calls, "invalid": whole.invalid_tool_calls}


@use
def completions() -> Any:
    old = OpenAI(base_url=URL, api_key="none", model=MODEL, temperature=0, max_tokens=8, max_retries=0)
    return {"text": old.invoke("In the beginning"), "streamed": "".join(old.stream("In the beginning"))}


@use
def refusals() -> Any:
    found = {}
    try:
        model().invoke("fox " * 3000)
    except ContextOverflowError as error:
        found["too_long"] = str(error)
    try:
        model(model_kwargs={"modalities": ["audio"]}).invoke(QUESTION)
    except openai.BadRequestError as error:
        found["param"] = error.param
    return found


def responses(**settings: Any) -> ChatOpenAI:
    return model(use_responses_api=True, **settings)


@use
def response() -> Any:
    answer = responses(max_tokens=12).invoke([SystemMessage("Be short."), HumanMessage(QUESTION)])
    return {"text": answer.text, "usage": answer.usage_metadata, "about": answer.response_metadata}


@use
def response_streamed() -> Any:
    chunks = list(responses(max_tokens=12).stream([SystemMessage("Be short."), HumanMessage(QUESTION)]))
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    return {"text": whole.text, "usage": whole.usage_metadata, "about": whole.response_metadata}


@use
def responses_at_once() -> Any:
    asked = [QUESTION, "The fox", "Who are you?", "Tell me a story about a cat."]
    return {
        "responses": [answer.text for answer in responses(max_tokens=8).batch(asked)],
        "chat": [answer.text for answer in model(max_tokens=8).batch(asked)],
    }


@use
def response_goes_on() -> Any:
    """The second request has the id of the first response in place of the messages before."""
    asks = responses(max_tokens=12, use_previous_response_id=True)
    messages: list[Any] = [HumanMessage(QUESTION)]
    first = asks.invoke(messages)
    second = asks.invoke([*messages, first, HumanMessage(AND_THEN)])
    return {"texts": [first.text, second.text], "ids": [each.response_metadata["id"] for each in (first, second)]}


@use
def response_sent_back() -> Any:
    """The second request has the whole conversation."""
    first = responses(max_tokens=12).invoke([HumanMessage(QUESTION)])
    second = responses(max_tokens=12).invoke([HumanMessage(QUESTION), first, HumanMessage(AND_THEN)])
    return [first.text, second.text]


@use
def response_in_a_form() -> Any:
    mood = responses().with_structured_output(Mood, method="json_schema").invoke(QUESTION)
    assert isinstance(mood, Mood)
    plain = {**Mood.model_json_schema(), "additionalProperties": False}
    *_, last = responses().with_structured_output(plain, method="json_schema").stream(QUESTION)
    return {"whole": mood.model_dump(), "streamed": last}


@use
def response_tools() -> Any:
    """A forced call, its result sent back, and the answer to that."""
    messages: list[Any] = [HumanMessage(QUESTION)]
    called = responses().bind_tools([look], tool_choice="look", strict=True).invoke(messages)
    (call,) = called.tool_calls
    result = look.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = responses().bind_tools([look], tool_choice="none").invoke([*messages, called, result])
    in_chat = model().bind_tools([look], tool_choice="none").invoke([*messages, called, result])
    return {
        "call": call,
        "result": result.content,
        "answer": answer.text,
        "in_chat": in_chat.text,
        "calls_again": answer.tool_calls,
    }


@use
def response_tools_streamed() -> Any:
    asks = responses().bind_tools([look], tool_choice="required", strict=True, parallel_tool_calls=False)
    chunks = list(asks.stream(QUESTION))
    whole = sum(chunks[1:], chunks[0])
    assert isinstance(whole, AIMessageChunk)
    pieces = [piece["args"] for chunk in chunks for piece in getattr(chunk, "tool_call_chunks", ())]
    return {"calls": whole.tool_calls, "invalid": whole.invalid_tool_calls, "pieces": pieces}


@use
def response_refusals() -> Any:
    found = {}
    try:
        responses().invoke("fox " * 3000)
    except ContextOverflowError as error:
        found["too_long"] = str(error)
    try:
        responses(truncation="auto").invoke(QUESTION)
    except openai.BadRequestError as error:
        found["param"] = error.param
    return found


def embeddings(**settings: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(base_url=URL, api_key="none", model=MODEL, max_retries=0, **settings)


def register_encoding(first_id: int) -> None:
    """In place of the encoding that LangChain takes for models that it does not know, and which it would download: one
    whose tokens are bytes, numbered from first_id on."""
    ranks = {bytes([byte]): first_id + byte for byte in range(256)}
    tiktoken.registry.ENCODINGS["cl100k_base"] = tiktoken.Encoding(
        "cl100k_base", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )


@use
def embedded() -> Any:
    return embeddings(check_embedding_ctx_length=False).embed_documents(json.loads(TEXTS))


@use
async def embedded_one_by_one() -> Any:
    """One text a request."""
    asks = embeddings(check_embedding_ctx_length=False, chunk_size=1)
    return {
        "several": await asks.aembed_documents(json.loads(TEXTS)),
        "single": await asks.aembed_query(json.loads(TEXTS)[0]),
    }


@use
def embedded_as_tokens() -> Any:
    register_encoding(0)
    return embeddings().embed_documents(json.loads(TEXTS))


@use
def embedding_refusals() -> Any:
    found = {}
    register_encoding(90_000)
    for name, asks in {
        "tokens": embeddings(),
        "dimensions": embeddings(check_embedding_ctx_length=False, dimensions=8),
    }.items():
        try:
            asks.embed_query(QUESTION)
        except openai.BadRequestError as error:
            found[name] = {"param": error.param, "message": error.message}
    return found


run_all()
