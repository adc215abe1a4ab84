"""What `test_own_server` asks both servers."""

from dataclasses import dataclass
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "Tell me a story about a fox."}]
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"enum": ["sea", "moon"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}


@dataclass(frozen=True)
class Ask:
    """body: None for a GET."""

    name: str
    path: str
    body: dict[str, Any] | None = None


def chat(name: str, **fields: Any) -> Ask:
    return Ask(name, CHAT, {"messages": HELLO, "temperature": 0, "max_tokens": 12, **fields})


def complete(name: str, **fields: Any) -> Ask:
    return Ask(name, COMPLETIONS, {"prompt": "In the beginning God", "temperature": 0, "max_tokens": 12, **fields})


REQUESTS = (
    chat("chat"),
    chat("chat with a stop string", stop="the", max_tokens=100),
    chat("chat that ends by itself", max_tokens=400),
    chat("chat with parts", messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]),
    chat("chat with probabilities", logprobs=True, top_logprobs=2),
    chat("chat with two choices", n=2),
    chat("chat with token ids", return_token_ids=True),
    chat("chat with the prompt's probabilities", prompt_logprobs=1),
    chat("chat streamed", stream=True),
    chat("chat streamed with usage", stream=True, stream_options={"include_usage": True}),
    chat("chat streamed with probabilities", stream=True, logprobs=True, top_logprobs=1),
    chat("chat with a choice of texts", structured_outputs={"choice": ["yes", "no"]}),
    chat("chat by a regular expression", structured_outputs={"regex": "a{3}b"}),
    chat(
        "chat with a named function",
        tools=[LOOK],
        tool_choice={"type": "function", "function": {"name": "look"}},
        max_tokens=60,
    ),
    chat("completion's field in a chat", suffix="x"),
    complete("completion"),
    complete("completion echoed", echo=True, logprobs=1),
    complete("completions of two prompts", prompt=["In the beginning", "And God said"], n=2),
    complete("completion of token ids", prompt=[5, 6, 7, 8]),
    complete("completion with probabilities", logprobs=2),
    complete("completion streamed", stream=True),
    complete("completion without max_tokens", max_tokens=None),
    Ask("models", "/v1/models"),
    chat("unknown model", model="another"),
    chat("no messages", messages=[]),
    chat("temperature out of range", temperature=-1),
    chat("max_tokens of nothing", max_tokens=0),
    chat("too many tokens", max_tokens=5000),
    chat("a type that is wrong", messages="Hi"),
    chat("usage without a stream", stream_options={"include_usage": True}),
    chat(
        "a schema that is none",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
    ),
    complete("no prompt", prompt=None),
    Ask("a path that is none", "/v1/nothing"),
)
