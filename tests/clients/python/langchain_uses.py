"""LangChain's ChatOpenAI as its users call it. Arguments: the address that ends in /v1, the model, the question."""

import sys
from typing import Annotated, Any, Literal

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field
from uses import run_all, use

_, URL, MODEL, QUESTION = sys.argv


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


run_all()
