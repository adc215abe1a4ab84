"""Write docs/reference from the configuration's schema, the commands' `--help`, and the tables of the API's fields and
of metrics.

    .venv/bin/python tools/make_reference.py

A unit test fails while the pages differ from what this writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from typer.main import get_command
from typer.testing import CliRunner

from stator.cli.main import typer_app
from stator.config.decode import expected, kebab, unwrap
from stator.config.engine_flags import expected as expected_flag
from stator.config.engine_flags import vllm_flags, vllm_version
from stator.config.schema import SECTIONS, ServiceArgs
from stator.config.step_times import shipped_step_times
from stator.engines.local.args import LocalEngineArgs
from stator.engines.sim.args import SimEngineArgs
from stator.frontend.openapi import document
from stator.messages.anthropic_fields import COUNT_FIELDS, MESSAGES_FIELDS
from stator.messages.embeddings import EMBEDDING_FIELDS
from stator.messages.openai_fields import CHAT_FIELDS, COMPLETION_FIELDS, Effect, Field
from stator.messages.responses_fields import RESPONSES_FIELDS
from stator.messages.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from stator.observability.metrics import FRONTEND_METRICS, FRONTEND_PROCESS_UP, ROUTER_METRICS, WORKER_METRICS

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference"
WIDTH = 100
MAX_CHOICES = 8

CONFIG_HEAD = """\
# Configuration reference

Made by `tools/make_reference.py` from the schema; do not edit. The rules (order of sources, merging, `Common`) are in
the guide to [graphs and their configuration](../guide/graphs.md).

A file has one section per service. Keys may be written with dashes or underscores. Sections of services that do not run
on a node are ignored there.
"""

ENGINE_HEAD = """\
## Engine flags of a worker's section

Every other key of `VllmWorker` and `PrefillWorker` is a flag of the engine, under vLLM's name for it. With
`engine: local` or `engine: sim` the flags of its table count; vLLM's others are accepted, and one line at the start
names them. A flag may be negated with `no-`, as on vLLM's command line; sizes may be written 8k (8000) or 8K (8192).

### Of the local engine

| flag | value | default |
|---|---|---|
"""

SIM_HEAD = """
### Of the sim engine

Those of the local engine, with these besides and these defaults of its own. `num-gpu-blocks-override` is by default
what the simulated GPUs hold, `kv-cache-memory-bytes` counts in bytes of the simulated model. `step-times` is one of
{names}; see the guide to [simulation](../guide/simulation.md).

| flag | value | default |
|---|---|---|
"""

VLLM_HEAD = """
### Of vLLM {version}

Their meaning is in vLLM's documentation. `{{…}}` takes a mapping, or JSON text, whose keys vLLM checks.

| flag | value | default |
|---|---|---|
"""

API_HEAD = """\
# Fields of the API

Made by `tools/make_reference.py` from the table by which requests are decoded; do not edit.

A field that is refused is answered with status 400 and its name in `param`, unless it has a value with which it asks
for nothing (null always is one). Fields that stand in none of these tables are other vendors' extensions: they are
ignored, and a line at log level DEBUG names them. What an engine cannot do is refused by name as well: the sim engine
has no probabilities, `logit_bias`, `allowed_token_ids` or embeddings; vLLM has embeddings of pooling models only
(`runner: pooling`), and those generate nothing.

`GET /openapi.json` has all of this, with types, ranges, answers and statuses, as an OpenAPI 3.1 document.

Every answer that is not streamed has `usage` with `prompt_tokens_details.cached_tokens`; a stream has it with
`stream_options.include_usage`. Of several choices each is routed, and continued after the death of its worker, by
itself; the prompt is counted once.
"""

MESSAGES_HEAD = """
## /v1/messages

In Anthropic's shape: request, answer, events of a stream and errors (`invalid_request_error` 400, `not_found_error`
404, `request_too_large` 413, `api_error` 500, `timeout_error` 504, `overloaded_error` 529). Errors name the field in
their message. The headers `anthropic-version`, `anthropic-beta` and `x-api-key` are accepted without effect.

`usage.input_tokens` is the prompt without what was in a cache, which is `cache_read_input_tokens`. `stop_sequence` says
which one ended the answer. Thinking carries a signature that signs nothing, and anybody's is taken. The `input` of a
call whose JSON the model did not end, or not write well, is `{"INVALID_JSON": "its text"}` in an answer that is not
streamed.

"""

COUNT_HEAD = """
## /v1/messages/count_tokens

The exact length of the prompt, with system and tools, by the model's own template and tokenizer; `/v1/messages` takes
these fields as well.

"""

RESPONSES_HEAD = """
## /v1/responses

OpenAI's Responses API over the same models: a request becomes one for a chat completion. A stream has the typed events
of that API, numbered, and ends with `response.completed`, `response.incomplete` or `response.failed`; there is no
`[DONE]`. Reasoning is an item with its text in `content`, and there are no summaries. `cache_write_tokens` is always 0.

Unless `store` is false or it failed, a response is kept: `GET /v1/responses/{id}` shows it, `DELETE` forgets it, and
`GET /v1/responses/{id}/input_items` lists everything that went into it, earlier turns included, by `limit`, `order`
and `after`. `previous_response_id` continues it, also after the responses before it are gone. The frontend process that
made a response keeps it in memory: at most 4096 of them in 64 MiB, each for a day, the oldest leave first. All
frontends of a deployment find it there, but it is gone when that process ends: then a request that names it is answered
with 404, and has to be sent again with the whole conversation in `input`. A conversation has as many bytes as a
request's body at most. Whoever knows a response's id can read it; ids cannot be guessed.
"""

METRICS_HEAD = """\
# Metrics reference

Made by `tools/make_reference.py` from the table of metrics; do not edit. `GET /metrics` on a frontend answers with all
of them, in Prometheus' text format: its own, and those of every worker and router that it knows. Times are in seconds,
ratios from 0 to 1. `worker` and `router` are instance ids. How to watch them:
[Prometheus and Grafana](../guide/metrics.md).
"""


def options(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Key, what it takes, default, help."""
    hints = get_type_hints(struct, include_extras=True)
    for field in msgspec.structs.fields(struct):
        if field.name.startswith("engine_arg"):
            continue
        bare, metas = unwrap(hints[field.name])
        key = prefix + (
            field.name if field.name.startswith(("served", "endpoint")) and not prefix else kebab(field.name)
        )
        if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
            yield from options(bare, f"{key}.")
            continue
        unit = next((meta.extra["unit"] for meta in metas if meta.extra and "unit" in meta.extra), None)
        takes = expected(hints[field.name]) + (f" ({unit})" if unit else "")
        text = next((meta.description for meta in metas if meta.description), "")
        yield key, takes, "required" if field.required else default_text(default_of(field)), text


def default_of(field: Any) -> Any:
    factory = field.default_factory
    return field.default if factory is msgspec.NODEFAULT else factory()


def default_text(value: Any) -> str:
    return "" if value is None else f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    lines += [f"| `{key}` | {cell(takes)} | {cell(default)} | {cell(text)} |" for key, takes, default, text in rows]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def flags_of(struct: type[msgspec.Struct]) -> Iterator[str]:
    hints = get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        if field.name not in ("model", "served_model_name"):
            default = "required" if field.required else default_text(default_of(field))
            yield f"| `{kebab(field.name)}` | {expected(hints[field.name])} | {default} |\n"


def local_flags() -> str:
    return "".join(flags_of(LocalEngineArgs))


def sim_flags() -> str:
    names = ", ".join(f"`{each.name}`" for each in shipped_step_times().named)
    same = set(flags_of(LocalEngineArgs))
    return SIM_HEAD.format(names=names) + "".join(row for row in flags_of(SimEngineArgs) if row not in same)


def engine_flags() -> str:
    lines: list[str] = []
    for name, flag in vllm_flags().items():
        takes = expected_flag(flag)
        if len(flag.choices) > MAX_CHOICES and takes.startswith("one of"):
            shown = ", ".join(str(choice) for choice in flag.choices[:MAX_CHOICES])
            takes = f"one of {shown} and {len(flag.choices) - MAX_CHOICES} more"
        takes = "{…}" if flag.nested else takes
        lines.append(f"| `{kebab(name)}` | {cell(takes)} | {default_text(flag.default)} |\n")
    return "".join(lines)


def config_page() -> str:
    parts = [CONFIG_HEAD]
    for name, struct in SECTIONS.items():
        doc = (struct.__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {name}\n\n{doc}\n\n{table(options(struct))}")
    parts.append(
        "## ServiceArgs\n\nOf any section, as a mapping: how the service's processes are run on this node.\n\n"
        + table(options(ServiceArgs))
    )
    parts.append(
        "## Common\n\nValues that a section pulls in with `common-configs: [key, ...]`. What the section says itself "
        "wins.\n"
    )
    return (
        "\n".join(parts)
        + "\n"
        + ENGINE_HEAD
        + local_flags()
        + sim_flags()
        + VLLM_HEAD.format(version=vllm_version())
        + engine_flags()
    )


def cli_page() -> str:
    parts = [
        "# Command line reference\n\nMade by `tools/make_reference.py` from `--help`; do not edit.\n",
        f"## stator\n\n{help_text()}",
    ]
    commands: dict[str, Any] = getattr(get_command(typer_app), "commands", {})
    for name, command in commands.items():
        parts.append(f"## stator {name}\n\n{help_text(name)}")
        parts += [
            f"### stator {name} {inner}\n\n{help_text(name, inner)}" for inner in getattr(command, "commands", {})
        ]
    return "\n".join(parts)


def help_text(*command: str) -> str:
    result = CliRunner().invoke(
        typer_app, [*command, "--help"], prog_name="stator", terminal_width=WIDTH, color=False, catch_exceptions=False
    )
    lines = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
    return f"```text\n{lines}\n```\n"


def api_page() -> str:
    parts = [API_HEAD, paths_table()]
    for path, fields in (
        ("/v1/chat/completions", CHAT_FIELDS),
        ("/v1/completions", COMPLETION_FIELDS),
        ("/v1/embeddings", EMBEDDING_FIELDS),
    ):
        parts.append(f"\n## {path}\n\n{field_table([each for each in fields if not each.extension])}")
        parts.append(f"\nvLLM's:\n\n{field_table([each for each in fields if each.extension])}")
    only_messages = [each for each in MESSAGES_FIELDS if each not in COUNT_FIELDS]
    parts.append(MESSAGES_HEAD + field_table(only_messages) + COUNT_HEAD + field_table(list(COUNT_FIELDS)))
    parts.append(f"{RESPONSES_HEAD}\n{field_table([each for each in RESPONSES_FIELDS if not each.extension])}")
    parts.append(f"\nvLLM's:\n\n{field_table([each for each in RESPONSES_FIELDS if each.extension])}")
    for path, fields in (("/tokenize", TOKENIZE_FIELDS), ("/detokenize", DETOKENIZE_FIELDS)):
        parts.append(f"\n## {path}\n\nAs in vLLM's server.\n\n{field_table(list(fields))}")
    return "".join(parts)


def paths_table() -> str:
    rows = [
        f"| `{method.upper()} {path}` | {operation['summary']} |\n"
        for path, operations in document()["paths"].items()
        for method, operation in operations.items()
        if method != "head"
    ]
    return "\n| path | |\n|---|---|\n" + "".join(rows)


def field_table(fields: list[Field]) -> str:
    rows = [f"| `{each.name}` | {each.effect.value} | {cell(field_note(each))} |\n" for each in fields]
    return "| field | | |\n|---|---|---|\n" + "".join(rows)


def field_note(field: Field) -> str:
    harmless = " or ".join(f"`{json.dumps(value)}`" for value in field.harmless)
    passes = f"passes as {harmless}" if harmless and field.effect is Effect.REFUSED else ""
    return "; ".join(part for part in (passes, field.note) if part)


def metrics_page() -> str:
    parts = [METRICS_HEAD]
    for title, specs in (
        ("Of the frontend", (*FRONTEND_METRICS, FRONTEND_PROCESS_UP)),
        ("Of each worker", WORKER_METRICS),
        ("Of each router", ROUTER_METRICS),
    ):
        parts.append(f"\n## {title}\n\n| metric | type | labels | what it says |\n|---|---|---|---|\n")
        for spec in specs:
            labels = ", ".join(f"`{label}`" for label in spec.labels)
            parts.append(f"| `stator_{spec.name}` | {spec.kind.value} | {labels} | {cell(spec.help)} |\n")
    return "".join(parts)


def pages() -> dict[str, str]:
    """By file name in docs/reference."""
    return {"config.md": config_page(), "cli.md": cli_page(), "api.md": api_page(), "metrics.md": metrics_page()}


def main() -> None:
    REFERENCE.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")
        print(f"docs/reference/{name}")


if __name__ == "__main__":
    main()
