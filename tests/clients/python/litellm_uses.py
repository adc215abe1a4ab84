"""LiteLLM as its users call it. Arguments: the address that ends in /v1, the model, the question."""

import asyncio
import sys
from typing import Annotated, Any, Literal

import litellm
from pydantic import BaseModel, Field
from uses import run_all, use

litellm.suppress_debug_info = True
_, URL, MODEL, QUESTION = sys.argv
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at something.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "enum": ["sea", "moon"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}


def asked(**settings: Any) -> dict[str, Any]:
    """provider: "openai" unless said."""
    provider = settings.pop("provider", "openai")
    where = {"model": f"{provider}/{MODEL}", "api_base": URL, "api_key": "none", "num_retries": 0}
    return {**where, "messages": MESSAGES, "temperature": 0, "max_tokens": 100, **settings}


class Mood(BaseModel):
    mood: Literal["calm", "cross"]
    age: Annotated[int, Field(ge=0, le=99)]


def shown(answer: Any) -> dict[str, Any]:
    """What a caller reads off an answer."""
    (choice,) = answer.choices
    return {
        "text": choice.message.content,
        "calls": [call.function.model_dump() for call in choice.message.tool_calls or ()],
        "finish_reason": choice.finish_reason,
        "usage": answer.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
    }


def streamed(**settings: Any) -> dict[str, Any]:
    asks = asked(stream=True, stream_options={"include_usage": True}, **settings)
    chunks = list(litellm.completion(**asks))
    return shown(litellm.stream_chunk_builder(chunks, messages=asks["messages"]))


@use
def chat() -> Any:
    return shown(litellm.completion(**asked(max_tokens=12)))


@use
def chat_as_vllm() -> Any:
    return shown(litellm.completion(**asked(provider="hosted_vllm", max_tokens=12)))


@use
def stream() -> Any:
    return streamed(max_tokens=12)


@use
def stream_as_vllm() -> Any:
    return streamed(provider="hosted_vllm", max_tokens=12)


@use
async def many_at_once() -> Any:
    asks = [asked(max_tokens=8, messages=[{"role": "user", "content": f"Story {number}."}]) for number in range(8)]
    return [shown(answer)["text"] for answer in await asyncio.gather(*(litellm.acompletion(**ask) for ask in asks))]


@use
async def stream_without_threads() -> Any:
    answer = await litellm.acompletion(**asked(max_tokens=12, stream=True))
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer if chunk.choices])


@use
def completions() -> Any:
    where = {"model": f"text-completion-openai/{MODEL}", "api_base": URL, "api_key": "none"}
    return litellm.text_completion(**where, prompt="In the beginning", temperature=0, max_tokens=8).choices[0].text


@use
def json_schema() -> Any:
    return shown(litellm.completion(**asked(response_format=Mood)))


@use
def tool_named() -> Any:
    choice = {"type": "function", "function": {"name": "look"}}
    return shown(litellm.completion(**asked(tools=[TOOL], tool_choice=choice)))


@use
def tool_required_streamed() -> Any:
    return streamed(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)


@use
def tool_answered() -> Any:
    called = litellm.completion(**asked(tools=[TOOL], tool_choice="required", parallel_tool_calls=False))
    message = called.choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "It is bright."}
    return shown(litellm.completion(**asked(messages=[*MESSAGES, message, result], tools=[TOOL], tool_choice="none")))


@use
def refusals() -> Any:
    found = {}
    try:
        litellm.completion(**asked(messages=[{"role": "user", "content": "fox " * 3000}]))
    except litellm.ContextWindowExceededError as error:
        found["too_long"] = str(error)
    try:
        litellm.completion(**{**asked(), "model": "openai/another"})
    except litellm.NotFoundError as error:
        found["model"] = str(error)
    try:
        litellm.completion(**asked(modalities=["audio"]))
    except litellm.BadRequestError as error:
        found["field"] = str(error)
    return found


run_all()
