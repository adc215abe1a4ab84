"""Every field of Anthropic's requests for messages, and what becomes of it here.

The names are those of the request types of the Python package `anthropic` 2.14.0 (`message_create_params`,
`message_count_tokens_params` and the types they refer to), and the betas `context_management` and `mcp_servers`. As
with OpenAI's (`openai_fields`), what is refused is declared all the same; docs/reference/api.md is made from these
tables.
"""

from stator.messages.openai_fields import Effect, Field, harmless_values


def _works(name: str, note: str = "") -> Field:
    return Field(name, Effect.WORKS, note)


def _accepted(name: str, note: str) -> Field:
    return Field(name, Effect.ACCEPTED, note)


def _refused(name: str, *harmless: object, note: str = "") -> Field:
    return Field(name, Effect.REFUSED, note, harmless)


_KEEPS_THOUGHTS = {"type": "clear_thinking_20251015", "keep": "all"}

_PROMPT: tuple[Field, ...] = (
    _works("model"),
    _works(
        "messages",
        "blocks `text`, `tool_use`, `tool_result` and `thinking`; others (images, documents, those of server tools) "
        "are refused, and so is an assistant's turn at the end, which would have to be continued",
    ),
    _accepted("messages.content.is_error", "of a tool's result; the model sees its content"),
    _accepted("messages.content.signature", "of thinking; nothing is signed"),
    _works("system", "a text or text blocks"),
    _works("tools", "the client's own, at most 128; otherwise as in chat completions"),
    _works("tools.strict"),
    _refused("tools.type", "custom", note="there are no server tools"),
    _refused("tools.defer_loading", False),
    _refused("tools.allowed_callers", ["direct"]),
    _refused("tools.input_examples", []),
    _works("tool_choice", "`any` and `tool` are kept by a grammar, with any model; `tool` makes one call"),
    _works("thinking", "`disabled` is refused if the model cannot be kept from it; one that cannot think does not"),
    _accepted("thinking.budget_tokens", "told to chat templates that have `thinking_budget`, and not enforced"),
    _works("thinking.display", "`omitted` leaves the text of `thinking` blocks out"),
    _works("output_config.effort", "if the model's chat template has such a choice; `xhigh` and `max` are `high`"),
    _works("output_config.format", "`json_schema`; the model writes nothing else. Schemas of 64 KiB and 32 levels"),
    _accepted("cache_control", "wherever it stands: every prompt's prefix is cached while there is room"),
    _refused("speed", "standard"),
    _refused("context_management", {"edits": []}, {"edits": [_KEEPS_THOUGHTS]}),
    _refused("mcp_servers", []),
    _refused("user_profile_id"),
    _refused("workspace_id"),
)

COUNT_FIELDS: tuple[Field, ...] = _PROMPT

MESSAGES_FIELDS: tuple[Field, ...] = (
    *_PROMPT,
    _works("max_tokens", "required; prompt and answer must fit the model's context"),
    _works("stream"),
    _works("stop_sequences", "at most 16 of 256 characters"),
    _works("temperature", "this, `top_p` and `top_k` are of the API's older versions"),
    _works("top_p"),
    _works("top_k"),
    _accepted("metadata", "nothing is kept of it"),
    _accepted("service_tier", "there is one"),
    _refused("container"),
    _refused("diagnostics"),
    _refused("inference_geo"),
)

UNSUPPORTED_UNLESS: dict[str, tuple[object, ...]] = harmless_values(MESSAGES_FIELDS)
"""Values, beside null, with which a field that is refused asks for nothing."""

TOOL_UNSUPPORTED_UNLESS: dict[str, tuple[object, ...]] = {
    each.name.removeprefix("tools."): each.harmless
    for each in MESSAGES_FIELDS
    if each.effect is Effect.REFUSED and each.name.startswith("tools.")
}
"""The same, of each tool."""
