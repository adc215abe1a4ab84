"""Engines by the name that a worker's `engine` key gives. An engine's modules are imported when it is chosen."""

from collections.abc import Callable, Mapping
from random import Random
from typing import Any, get_type_hints

from stator.engines.base import Engine
from stator.errors import ConfigError


def create_engine(name: str, values: Mapping[str, Any], *, rng: Random | None = None) -> Engine:
    """An engine that has not been started.

    values: the engine's own keys of the worker's section (vLLM's flag names). rng: for what engines of ours draw, seeds
    and ids; None for one that nobody can predict, or by the key `seed`. Raises ConfigError for an unknown engine, key
    or value.
    """
    factory = _ENGINES.get(name)
    if factory is None:
        raise ConfigError(f"there is no engine {name!r}; known engines: {', '.join(sorted(_ENGINES))}")
    return factory(values, rng)


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
    if name not in ("local", "sim"):
        return None
    from stator.engines.local.args import WITHOUT_MEANING_HERE, LocalEngineArgs

    if name == "local":
        return get_type_hints(LocalEngineArgs), WITHOUT_MEANING_HERE
    from stator.engines.sim.args import SimEngineArgs

    return get_type_hints(SimEngineArgs), WITHOUT_MEANING_HERE


def _local(values: Mapping[str, Any], rng: Random | None) -> Engine:
    from stator.engines.local.args import args_from_section
    from stator.engines.local.engine import LocalEngine
    from stator.engines.local.load import numpy_runner, with_local_model

    args = args_from_section(values)
    rng = rng if args.seed is None else None
    return LocalEngine(args, runner_factory=numpy_runner, prepare=with_local_model, rng=rng)


def _sim(values: Mapping[str, Any], rng: Random | None) -> Engine:
    from stator.engines.sim.args import args_from_section
    from stator.engines.sim.engine import SimEngine

    args = args_from_section(values)
    return SimEngine(args, rng=rng if args.seed is None else None)


def _vllm(values: Mapping[str, Any], _rng: Random | None) -> Engine:
    from stator.engines.vllm.args import settings_from_section
    from stator.engines.vllm.engine import VllmEngine

    return VllmEngine(settings_from_section(values))


_ENGINES: dict[str, Callable[[Mapping[str, Any], Random | None], Engine]] = {
    "local": _local,
    "sim": _sim,
    "vllm": _vllm,
}
