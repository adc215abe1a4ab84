"""Write src/stator/config/vllm_flags.json: vLLM's engine flags, so that they are known where vLLM is not installed.

    PYTHON_WITH_VLLM tools/vllm_flags.py

Name, types, default, choices and whether a flag holds a configuration of its own come from `AsyncEngineArgs` and its
command line parser. Help texts stay with vLLM's own documentation.
"""

import argparse
import builtins
import dataclasses
import enum
import json
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import vllm
import vllm.engine.arg_utils as arg_utils
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

OUT = Path(__file__).resolve().parent.parent / "src" / "stator" / "config" / "vllm_flags.json"
SIZES = ("human_readable_int", "human_readable_int_or_auto")
ORDER = ("bool", "int", "size", "float", "object", "list", "str")


@dataclasses.dataclass
class Unseen:
    """Stands for the configuration classes that vLLM imports for type checkers only."""


class _Names(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        return Unseen


def hint_of(field: Any) -> Any:
    if not isinstance(field.type, str):
        return field.type
    return eval(field.type, {}, _Names(vars(arg_utils)))


def type_names(hint: Any) -> set[str]:
    """Of ORDER, and `null`."""
    origin = get_origin(hint)
    if origin is Annotated:
        return type_names(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return {name for member in get_args(hint) for name in type_names(member)}
    if hint is type(None):
        return {"null"}
    if origin is Literal:
        return {name for value in get_args(hint) for name in type_names(type(value))}
    base = origin or hint
    if not isinstance(base, type):
        return {"str", "object", "int", "float", "bool", "list"} if hint is Any else {"str"}
    if issubclass(base, enum.Enum):
        return {"str", "int"} if issubclass(base, int) else {"str"}
    for kind, name in ((bool, "bool"), (int, "int"), (float, "float"), (str, "str"), (dict, "object")):
        if issubclass(base, kind):
            return {name}
    if issubclass(base, (list, tuple, set)):
        return {"list"}
    return {"object"} if dataclasses.is_dataclass(base) else {"str"}


def literal_choices(hint: Any) -> list[Any]:
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if value is not None]
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return [choice for member in get_args(hint) for choice in literal_choices(member)]
    return []


def only_choices(hint: Any) -> bool:
    """Whether nothing but the choices (and None) fits."""
    if get_origin(hint) in (Union, types.UnionType):
        return all(only_choices(member) for member in get_args(hint))
    return hint is type(None) or get_origin(hint) is Literal


def is_nested(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType, Annotated):
        return any(is_nested(member) for member in get_args(hint))
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def parsed_as(action: argparse.Action) -> set[str]:
    """Names of the parsing functions of a flag, through vLLM's wrapper for optional values."""
    function: Any = action.type
    cells = getattr(function, "__closure__", None) or ()
    inner = [cell.cell_contents for cell in cells if callable(cell.cell_contents)]
    return {getattr(each, "__name__", "") for each in (function, *inner)}


def plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return plain(value.name if isinstance(value.value, int) else value.value)
    if dataclasses.is_dataclass(value) or callable(value):
        return None
    try:
        json.dumps(value)
    except TypeError:
        return None
    return value


def describe(field: Any, hint: Any, action: argparse.Action) -> dict[str, Any]:
    kinds = type_names(hint)
    if kinds & {"int"} and parsed_as(action) & set(SIZES):
        kinds = kinds - {"int"} | {"size"}
    if "human_readable_int_or_auto" in parsed_as(action):
        kinds |= {"str"}
    flag: dict[str, Any] = {"types": [name for name in ORDER if name in kinds]}
    if "null" in kinds or action.default is None:
        flag["optional"] = True
    default = action.default if action.default is not argparse.SUPPRESS else None
    if (default := plain(default)) is not None:
        flag["default"] = default
    choices = [plain(c) for c in action.choices or () if c is not None] or (
        literal_choices(hint) if only_choices(hint) else []
    )
    if choices:
        flag["choices"] = choices
    if is_nested(hint):
        flag["nested"] = True
    return flag


def main() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    actions = {action.dest: action for action in parser._actions}
    flags = {
        field.name.replace("_", "-"): describe(field, hint_of(field), actions[field.name])
        for field in sorted(dataclasses.fields(AsyncEngineArgs), key=lambda f: f.name)
        if field.name in actions
    }
    document = {"vllm": vllm.__version__.split("+")[0], "flags": flags}
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(flag)}" for name, flag in flags.items())
    OUT.write_text(f'{{\n  "vllm": {json.dumps(document["vllm"])},\n  "flags": {{\n{lines}\n  }}\n}}\n')
    print(f"{OUT.name}: {len(flags)} flags of vLLM {document['vllm']}")


if __name__ == "__main__":
    main()
