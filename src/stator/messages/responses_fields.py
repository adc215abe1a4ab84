"""Every field of OpenAI's Responses requests, and what becomes of it here.

The names are those of the request type of the Python package `openai` 3.57.0
(`openai.types.responses.response_create_params`), with a dot before a field inside. docs/reference/api.md is made from
this table.
"""

from stator.messages.openai_fields import Effect, Field, harmless_values


def _works(name: str, note: str = "") -> Field:
    return Field(name, Effect.WORKS, note)


def _accepted(name: str, note: str) -> Field:
    return Field(name, Effect.ACCEPTED, note)


def _refused(name: str, *harmless: object, note: str = "") -> Field:
    return Field(name, Effect.REFUSED, note, harmless)


def _extension(name: str, note: str = "") -> Field:
    return Field(name, Effect.WORKS, note, extension=True)


PASSED_ON = (
    "temperature", "top_p", "parallel_tool_calls", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos",
    "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids",
    "skip_special_tokens", "priority", "cache_salt", "structured_outputs", "chat_template_kwargs",
)  # fmt: skip
"""Fields that mean what they mean in chat."""

RESPONSES_FIELDS: tuple[Field, ...] = (
    _works("model"),
    _works(
        "input",
        "a text, or items of the types message, function_call, function_call_output, reasoning and item_reference; "
        "content is text",
    ),
    _refused("input.content.prompt_cache_breakpoint"),
    _accepted("input.phase", "what came in between is told from the final answer by its place"),
    _accepted("input.status", "nothing is kept of it"),
    _refused("input.encrypted_content", note="reasoning is in `content`, as text"),
    _refused("input.caller", {"type": "direct"}),
    _refused("input.namespace"),
    _refused("input.async", False),
    _works("instructions", "before everything else, as a system message; not carried over to the next response"),
    _works("previous_response_id", "what went before it, its input and its output go before `input`"),
    _works("store", "true if absent: the response can be fetched and continued while there is room for it"),
    _works("stream"),
    _refused("stream_options.include_obfuscation", False, note="streams are never padded"),
    _works("max_output_tokens", "reasoning included"),
    _works("temperature"),
    _works("top_p"),
    _works("top_logprobs", "0 to 20; more than 0 asks for `logprobs` as well"),
    _works("tools", "functions, at most 128; if the model's chat template takes tools in a known format"),
    _refused("tools.defer_loading", False),
    _refused("tools.allowed_callers", ["direct"]),
    _refused("tools.output_schema"),
    _refused("tools.async", False),
    _works("tool_choice", "a mode, a function, or `allowed_tools` of functions; kept by a grammar if it forces calls"),
    _works("parallel_tool_calls"),
    _accepted("max_tool_calls", "it counts calls of built-in tools, of which there are none"),
    _works("text.format", "`json_schema` or `json_object`; the model writes nothing else"),
    _refused("text.verbosity", "medium"),
    _works("reasoning.effort", "if the model's chat template has it, or a switch for reasoning"),
    _refused("reasoning.summary", "auto", note="reasoning is shown as it is, in `content`"),
    _refused("reasoning.generate_summary", "auto"),
    _refused("reasoning.context", "auto"),
    _refused("reasoning.mode", "standard"),
    _works(
        "include",
        "`message.output_text.logprobs`; OpenAI's other names are accepted, for there is nothing else to include",
    ),
    _works("metadata", "16 pairs; shown in the response"),
    _accepted("user", "shown in the response"),
    _accepted("safety_identifier", "shown in the response"),
    _accepted("prompt_cache_key", "shown in the response; the router finds the longest cached prefix by itself"),
    _refused("prompt_cache_retention", "in_memory", note="prompts stay cached while there is room"),
    _refused("prompt_cache_options", {}, {"mode": "implicit"}),
    _refused("truncation", "disabled", note="an input that is too long is refused"),
    _refused("background", False),
    _refused("background_options", {}, {"completion_window": "soonest"}),
    _refused("service_tier", "auto", "default", note="see `priority`"),
    _refused("conversation", note="see `previous_response_id`"),
    _refused("context_management", []),
    _refused("prompt"),
    _refused("moderation"),
    _refused("image", {}, {"context_compression": "auto"}, {"context_compression": "disabled"}),
    _refused("access_programs", {}, {"cyber": "standard"}),
    _extension("top_k", "0 and -1 are off"),
    _extension("min_p"),
    _extension("seed", "equal text on the same engine and version"),
    _extension("stop", "at most 16 strings of 256 characters"),
    _extension("stop_token_ids", "at most 256"),
    _extension("ignore_eos"),
    _extension("min_tokens"),
    _extension("presence_penalty"),
    _extension("frequency_penalty"),
    _extension("repetition_penalty"),
    _extension("logit_bias", "token ids, at most 1024; -100 to 100"),
    _extension("allowed_token_ids", "at most 4096"),
    _extension("skip_special_tokens"),
    _extension("priority", "of requests that wait, those with a smaller number are first"),
    _extension("cache_salt", "requests with different salts share no cached prompt"),
    _extension("structured_outputs", "one of `json`, `regex`, `choice`, `grammar`, `json_object`; not with `text`"),
    _extension("chat_template_kwargs", "`enable_thinking`, `thinking`, `thinking_budget`"),
)

HARMLESS = harmless_values(RESPONSES_FIELDS)
"""Of the refused fields of the body itself: values, beside null, with which they ask for nothing."""

HARMLESS_INSIDE = {each.name: each.harmless for each in RESPONSES_FIELDS if each.effect is Effect.REFUSED}
"""Of those inside another field too."""

INCLUDABLE = frozenset(
    (
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
        "reasoning.encrypted_content",
        "message.output_text.logprobs",
    )
)
