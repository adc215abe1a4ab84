"""LiteLLM as its users call it.

Arguments: the address that ends in /v1, the model, a question, another that follows it, and texts as a JSON list.
"""

import asyncio
import json
import sys
from typing import Annotated, Any, Literal

import litellm
from pydantic import BaseModel, Field
from uses import run_all, use

litellm.suppress_debug_info = True
_, URL, MODEL, QUESTION, AND_THEN, TEXTS = sys.argv
# It asks for no stream of a response of a model that it does not know, and makes one up from the whole.
litellm.register_model(
    {f"{provider}/{MODEL}": {"litellm_provider": provider, "mode": "chat"} for provider in ("openai", "hosted_vllm")}
)
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


def where(provider: str) -> dict[str, Any]:
    return {"model": f"{provider}/{MODEL}", "api_base": URL, "api_key": "none", "num_retries": 0}


def asked_for_response(**settings: Any) -> dict[str, Any]:
    """provider: "openai" unless said."""
    given = {"input": QUESTION, "instructions": "Be short.", "temperature": 0, "max_output_tokens": 100}
    return {**where(settings.pop("provider", "openai")), **given, **settings}


def shown_response(response: Any) -> dict[str, Any]:
    texts = [part.text for item in response.output if item.type == "message" for part in item.content]
    calls = [item.model_dump() for item in response.output if item.type == "function_call"]
    usage = response.usage.model_dump(include={"input_tokens", "output_tokens", "total_tokens"})
    return {"id": response.id, "text": "".join(texts), "calls": calls, "usage": usage, "status": response.status}


def response_events(**settings: Any) -> dict[str, Any]:
    events = list(litellm.responses(**asked_for_response(stream=True, **settings)))
    deltas: dict[str, str] = {}
    for event in events:
        if hasattr(event, "delta"):
            deltas[event.type] = deltas.get(event.type, "") + event.delta
    return {
        "types": [event.type for event in events],
        "deltas": deltas,
        **shown_response(events[-1].response),
    }


@use
def response() -> Any:
    return shown_response(litellm.responses(**asked_for_response(max_output_tokens=12)))


@use
def response_as_vllm() -> Any:
    return shown_response(litellm.responses(**asked_for_response(provider="hosted_vllm", max_output_tokens=12)))


@use
def response_streamed() -> Any:
    return response_events(max_output_tokens=12)


@use
def response_streamed_as_vllm() -> Any:
    return response_events(provider="hosted_vllm", max_output_tokens=12)


@use
async def response_streamed_without_threads() -> Any:
    events = await litellm.aresponses(**asked_for_response(max_output_tokens=12, stream=True))
    return "".join([event.delta async for event in events if event.type == "response.output_text.delta"])


@use
async def response_goes_on() -> Any:
    """LiteLLM puts ids of its own in place of those of the server."""
    asks = asked_for_response(max_output_tokens=12, instructions=None)
    first = await litellm.aresponses(**asks)
    second = await litellm.aresponses(**{**asks, "input": AND_THEN, "previous_response_id": first.id})
    by_id = {"api_base": URL, "api_key": "none", "custom_llm_provider": "openai"}
    again = await litellm.aget_responses(response_id=first.id, **by_id)
    items = await litellm.alist_input_items(response_id=second.id, **by_id)
    deleted = await litellm.adelete_responses(response_id=first.id, **by_id)
    try:
        await litellm.aget_responses(response_id=first.id, **by_id)
        gone = False
    except litellm.NotFoundError:
        gone = True
    return {
        "texts": [shown_response(each)["text"] for each in (first, second)],
        "again": shown_response(again)["text"],
        "num_items": len(items["data"]),
        "deleted": deleted.deleted,
        "gone": gone,
    }


@use
def response_in_a_form() -> Any:
    return shown_response(litellm.responses(**asked_for_response(text_format=Mood)))


RESPONSE_TOOL = {"type": "function", "strict": True, **TOOL["function"]}


@use
def response_tool_named() -> Any:
    choice = {"type": "function", "name": "look"}
    return shown_response(litellm.responses(**asked_for_response(tools=[RESPONSE_TOOL], tool_choice=choice)))


@use
def response_tool_streamed() -> Any:
    return response_events(tools=[RESPONSE_TOOL], tool_choice="required", parallel_tool_calls=False)


@use
def response_tool_answered() -> Any:
    asks = asked_for_response(tools=[RESPONSE_TOOL], tool_choice="required", parallel_tool_calls=False)
    called = litellm.responses(**asks)
    (call,) = called.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It is bright."}
    given = [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), result]
    by_items = litellm.responses(**{**asks, "tool_choice": "none", "input": given})
    by_id = {**asks, "tool_choice": "none", "input": [result], "previous_response_id": called.id}
    return {"by_items": shown_response(by_items), "by_id": shown_response(litellm.responses(**by_id))}


@use
def response_refusals() -> Any:
    found = {}
    try:
        litellm.responses(**asked_for_response(input="fox " * 3000))
    except litellm.ContextWindowExceededError as error:
        found["too_long"] = str(error)
    try:
        litellm.responses(**{**asked_for_response(), "model": "openai/another"})
    except litellm.NotFoundError as error:
        found["model"] = str(error)
    try:
        litellm.responses(**asked_for_response(truncation="auto"))
    except litellm.BadRequestError as error:
        found["field"] = str(error)
    return found


def shown_vectors(answer: Any) -> dict[str, Any]:
    """Those in base64 as the text they come as."""
    return {"vectors": [each["embedding"] for each in answer.data], "usage": answer.usage.model_dump()}


@use
def embedded() -> Any:
    return shown_vectors(litellm.embedding(**where("openai"), input=json.loads(TEXTS)))


@use
def embedded_as_vllm() -> Any:
    return shown_vectors(litellm.embedding(**where("hosted_vllm"), input=json.loads(TEXTS)))


@use
async def embedded_in_base64() -> Any:
    return shown_vectors(await litellm.aembedding(**where("openai"), input=json.loads(TEXTS), encoding_format="base64"))


@use
def embedded_tokens() -> Any:
    return shown_vectors(litellm.embedding(**where("openai"), input=[[7, 8, 9], [1000]]))


@use
def embedding_refusals() -> Any:
    found = {}
    try:
        litellm.embedding(**where("openai"), input=["fox " * 3000])
    except litellm.ContextWindowExceededError as error:
        found["too_long"] = str(error)
    try:
        litellm.embedding(**where("openai"), input=[""])
    except litellm.BadRequestError as error:
        found["empty"] = str(error)
    return found


run_all()
