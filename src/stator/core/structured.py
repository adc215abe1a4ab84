"""The request's fields about the form of the answer, checked and brought into one form that engines enforce."""

from typing import Any

import msgspec

from stator.core.json_schema import check_schema, invalid
from stator.core.tools.request import NAME_RULE, is_name
from stator.errors import DECODE_ERRORS
from stator.messages.grammar import Choice, Grammar, Json, Literal, OwnGrammar, Regex
from stator.messages.tools import ResponseFormat, StructuredOutputs

MAX_REGEX_CHARS = 2048
MAX_GRAMMAR_CHARS = 1 << 16
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 4096

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


def normalize_response_format(format: ResponseFormat | None) -> Grammar | None:
    """Raises StatorError(INVALID_REQUEST) that names the field."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return Json(_ANY_OBJECT)
    where = "response_format.json_schema"
    if format.json_schema is None:
        raise invalid(where, f'{where} is required with the type "json_schema"')
    if not is_name(format.json_schema.name):
        raise invalid(f"{where}.name", f"{where}.name must be {NAME_RULE}")
    schema = format.json_schema.schema
    if schema is None:
        raise invalid(f"{where}.schema", f"{where}.schema is required")
    check_schema(schema, f"{where}.schema")
    return Json(schema)


def normalize_structured_outputs(asked: StructuredOutputs | None) -> Grammar | None:
    """Raises StatorError(INVALID_REQUEST) that names the field."""
    if asked is None:
        return None
    given = [name for name in asked.__struct_fields__ if getattr(asked, name) not in (None, False)]
    where = "structured_outputs"
    if len(given) != 1:
        names = ", ".join(asked.__struct_fields__)
        raise invalid(where, f"{where} must have exactly one of {names}, not {len(given)}")
    where = f"{where}.{given[0]}"
    if asked.regex is not None:
        _check_length(asked.regex, where, MAX_REGEX_CHARS)
        return Regex(asked.regex)
    if asked.choice is not None:
        return Choice(_choices(asked.choice, where))
    if asked.grammar is not None:
        _check_length(asked.grammar, where, MAX_GRAMMAR_CHARS)
        return OwnGrammar(asked.grammar)
    return Json(_ANY_OBJECT if asked.json is None else _schema(asked.json, where))


def one_grammar(response_format: Grammar | None, structured_outputs: Grammar | None) -> Grammar | None:
    """Raises StatorError(INVALID_REQUEST) if both are asked for."""
    if response_format is not None and structured_outputs is not None:
        raise invalid("structured_outputs", "response_format and structured_outputs cannot be given together")
    return response_format or structured_outputs


def _check_length(text: str, where: str, max_chars: int) -> None:
    if not 1 <= len(text) <= max_chars:
        raise invalid(where, f"{where} must have 1 to {max_chars} characters; it has {len(text)}")


def _choices(options: list[str], where: str) -> tuple[Literal, ...]:
    if not 1 <= len(options) <= MAX_CHOICES:
        raise invalid(where, f"{where} must have 1 to {MAX_CHOICES} entries; it has {len(options)}")
    for index, option in enumerate(options):
        _check_length(option, f"{where}[{index}]", MAX_CHOICE_CHARS)
    return tuple(Literal(option) for option in dict.fromkeys(options))


def _schema(given: dict[str, Any] | str, where: str) -> dict[str, Any]:
    """vLLM takes a schema as a JSON text too."""
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given, type=dict[str, Any])
        except DECODE_ERRORS:
            raise invalid(where, f"{where} is not a JSON object") from None
    check_schema(given, where)
    return given
