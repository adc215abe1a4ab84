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


def check_installed(name: str, *, allow_untested: bool) -> None:
    """Raise ConfigError if this interpreter has no engine of that name, or one that Stator was not tested with.

    Imports nothing of the engine, so that it may be asked before anything is started.
    """
    if name == "vllm":
        from stator.engines.vllm.version import check_version, installed_version

        check_version(installed_version(), allow_untested)


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


def _vllm(values: Mapping[str, Any]) -> Engine:
    from stator.engines.vllm.args import settings_from_section
    from stator.engines.vllm.engine import VllmEngine

    return VllmEngine(settings_from_section(values))


_ENGINES: dict[str, Callable[[Mapping[str, Any]], Engine]] = {"local": _local, "vllm": _vllm}
