"""Engines by the name that a worker's `engine` key gives. An engine's modules are imported when it is chosen."""

from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from stator.engines.base import Engine
from stator.errors import ConfigError


def create_engine(name: str, values: Mapping[str, Any]) -> Engine:
    """An engine that has not been started.

    values: the engine's own keys of the worker's section (vLLM's flag names). Raises ConfigError for an unknown
    engine, key or value.
    """
    factory = _ENGINES.get(name)
    if factory is None:
        raise ConfigError(f"there is no engine {name!r}; known engines: {', '.join(sorted(_ENGINES))}")
    return factory(values)


def engine_names() -> list[str]:
    """The engines that this version has."""
    return sorted(_ENGINES)


def own_flags(name: str) -> tuple[dict[str, Any], frozenset[str]] | None:
    """The flags, with underscores, that an engine takes and their types, and others that mean nothing to it.

    None for an engine that takes vLLM's.
    """
    if name != "local":
        return None
    from stator.engines.local.args import WITHOUT_MEANING_HERE, LocalEngineArgs

    return get_type_hints(LocalEngineArgs), WITHOUT_MEANING_HERE


def _local(values: Mapping[str, Any]) -> Engine:
    from stator.engines.local.args import args_from_section
    from stator.engines.local.engine import LocalEngine
    from stator.engines.local.load import numpy_runner, with_local_model

    return LocalEngine(args_from_section(values), runner_factory=numpy_runner, prepare=with_local_model)


_ENGINES: dict[str, Callable[[Mapping[str, Any]], Engine]] = {"local": _local}
