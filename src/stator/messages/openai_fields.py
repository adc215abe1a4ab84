"""Every field of OpenAI's requests for chat and text completions, and what becomes of it here.

The names are those of the request types of the Python package `openai` 3.57.0 (`openai.types.chat` and
`openai.types.completion_create_params`), and of vLLM 0.32 for the extensions. A field that is refused is declared in
`messages.openai` all the same, so that a request that uses it is told so instead of getting another answer than it
asked for. docs/reference/api.md is made from these tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Effect(StrEnum):
    WORKS = "works"
    ACCEPTED = "accepted without effect"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Field:
    """name: as in the body, with a dot before a field inside. harmless: values, beside null, with which a refused field
    asks for nothing, so that they pass. note: bounds and what else differs. extension: not OpenAI's, but vLLM's."""

    name: str
    effect: Effect
    note: str = ""
    harmless: tuple[Any, ...] = ()
    extension: bool = False


def _works(name: str, note: str = "") -> Field:
    return Field(name, Effect.WORKS, note)


def _extension(name: str, note: str = "") -> Field:
    return Field(name, Effect.WORKS, note, extension=True)


def _accepted(name: str, note: str) -> Field:
    return Field(name, Effect.ACCEPTED, note)


def _refused(name: str, *harmless: Any, note: str = "") -> Field:
    return Field(name, Effect.REFUSED, note, harmless)


_STREAM = (
    _works("stream"),
    _works("stream_options.include_usage", "only with `stream`"),
    _refused("stream_options.include_obfuscation", False, note="streams are never padded"),
)

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""vLLM's older names, which it has dropped too."""

_FORM = "`json_object` or `json_schema`; the model writes nothing else. Schemas of 64 KiB and 32 levels"

_EXTENSIONS = (
    _extension("stream_options.continuous_usage_stats", "with `include_usage`: each chunk has the usage so far"),
    _extension("top_k", "0 and -1 are off"),
    _extension("min_p"),
    _extension("repetition_penalty"),
    _extension("min_tokens"),
    _extension("stop_token_ids", "at most 256"),
    _extension("ignore_eos"),
    _extension("skip_special_tokens"),
    _extension("allowed_token_ids", "at most 4096"),
    _extension("prompt_logprobs", "0 to 20; without `stream`; the prompt is computed whole, by the decode worker"),
    _extension("return_token_ids"),
    _extension("priority", "of requests that wait, those with a smaller number are first"),
    _extension("cache_salt", "requests with different salts share no cached prompt"),
    _extension("structured_outputs", "one of `json`, `regex`, `choice`, `grammar`, `json_object`"),
    *(Field(name, Effect.REFUSED, "use `structured_outputs`", extension=True) for name in _GUIDED),
)

CHAT_FIELDS: tuple[Field, ...] = (
    _works("model"),
    _works("messages", "text only: other content parts are refused"),
    _refused("messages.audio"),
    _refused("messages.refusal"),
    _refused("messages.function_call", note="the older form of tool_calls"),
    _works("max_completion_tokens"),
    _works("max_tokens", "`max_completion_tokens` goes before it"),
    _works("temperature"),
    _works("top_p"),
    _works("n", "1 to 128; each choice has a seed of its own, made from `seed`"),
    _works("seed", "equal text on the same engine and version"),
    _works("stop", "at most 16 strings of 256 characters"),
    *_STREAM,
    _works("logprobs"),
    _works("top_logprobs", "0 to 20; of the model's own distribution, before temperature and penalties"),
    _works("logit_bias", "token ids, at most 1024; -100 to 100"),
    _works("presence_penalty"),
    _works("frequency_penalty"),
    _accepted("user", "nothing is kept of it"),
    _accepted("safety_identifier", "nothing is kept of it"),
    _accepted("metadata", "nothing is kept of it"),
    _accepted("prompt_cache_key", "the router finds the worker with the longest cached prefix by itself"),
    _refused("prompt_cache_retention", "in_memory", note="prompts stay cached while there is room"),
    _refused("prompt_cache_options", {}, {"mode": "implicit"}),
    _refused("service_tier", "auto", "default", note="see `priority`"),
    _refused("store", False),
    _works("tools", "functions, at most 128; if the model's chat template takes tools in a known format"),
    _works("tool_choice", "`required` and a named function are kept by a grammar, with any model"),
    _works("parallel_tool_calls"),
    _refused("functions", []),
    _refused("function_call", "none", "auto"),
    _works("response_format", _FORM),
    _refused("modalities", ["text"]),
    _refused("audio"),
    _works("reasoning_effort", "if the model's chat template has it, or a switch for reasoning"),
    _refused("verbosity", "medium"),
    _refused("prediction"),
    _refused("moderation"),
    _refused("web_search_options"),
    _extension("chat_template_kwargs", "`enable_thinking`, `thinking`, `thinking_budget`"),
    _extension("include_reasoning", "false leaves `reasoning_content` out"),
    *_EXTENSIONS,
)

COMPLETION_FIELDS: tuple[Field, ...] = (
    _works("model"),
    _works("prompt", "a text, texts, token ids or lists of token ids; at most 512 choices together"),
    _works("max_tokens", "16 if absent; 0 only with `echo`"),
    _works("temperature"),
    _works("top_p"),
    _works("n", "1 to 128, of each prompt; each choice has a seed of its own, made from `seed`"),
    _works("seed", "equal text on the same engine and version"),
    _works("stop", "at most 16 strings of 256 characters"),
    *_STREAM,
    _works("logprobs", "0 to 20; of the model's own distribution, before temperature and penalties"),
    _works("echo"),
    _works("logit_bias", "token ids, at most 1024; -100 to 100"),
    _works("presence_penalty"),
    _works("frequency_penalty"),
    _accepted("user", "nothing is kept of it"),
    _refused("best_of", note="unless it is equal to `n`"),
    _refused("suffix", ""),
    _extension("response_format", _FORM),
    *_EXTENSIONS,
)


def harmless_values(fields: Sequence[Field]) -> dict[str, tuple[Any, ...]]:
    """Of the refused fields that are fields of the body itself."""
    return {each.name: each.harmless for each in fields if each.effect is Effect.REFUSED and "." not in each.name}


UNSUPPORTED_UNLESS: dict[str, tuple[Any, ...]] = {**harmless_values(COMPLETION_FIELDS), **harmless_values(CHAT_FIELDS)}
"""Values, beside null, with which a field that is refused asks for nothing."""
