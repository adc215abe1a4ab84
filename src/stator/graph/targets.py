"""Targets on the command line: `module[:Service]` or `path.py[:Service]`."""

import difflib
import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from stator.errors import ConfigError
from stator.graph.service import is_service, spec_of


def load_target(target: str, directory: Path) -> type[Any]:
    """Import what `target` names and return the service class.

    directory is put first on `sys.path`; relative paths are relative to it. Without `:Service` the module's only root
    service is taken. Raises ConfigError, saying which: the module is not there, it cannot be imported, it has no such
    attribute, the attribute is not a service.
    """
    module_name, _, attribute = target.partition(":")
    if not module_name:
        raise ConfigError(f"target {target!r} names no module; expected module[:Service] or path.py[:Service]")
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    if module_name.endswith(".py"):
        module = _import_path(directory / module_name, target)
    else:
        module = _import_module(module_name, target, directory)
    if not attribute:
        return _root_service(module, target)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigError(f"target {target!r}: {module_name} has no attribute {part!r}{_choices(module, part)}")
        value = getattr(value, part)
    if not is_service(value):
        raise ConfigError(
            f"target {target!r}: {attribute} is {_kind(value)}, not a service: decorate the class with @service"
        )
    return value


def _import_module(name: str, target: str, directory: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ConfigError(_import_failed(name, target, error)) from error
        raise ConfigError(
            f"target {target!r}: there is no module {error.name!r} in {directory} or on PYTHONPATH; "
            f"run from the directory that holds it, or give the path of a .py file"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"target {target!r}: {error}") from error
    except Exception as error:
        raise ConfigError(_import_failed(name, target, error)) from error


def _import_path(path: Path, target: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"target {target!r}: there is no file {path}")
    name = f"stator_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"target {target!r}: {path} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        if isinstance(error, ConfigError):
            raise ConfigError(f"target {target!r}: {error}") from error
        raise ConfigError(_import_failed(str(path), target, error)) from error
    return module


def _import_failed(name: str, target: str, error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"target {target!r}: importing {name} failed: {type(error).__name__}: {error}{where}"


def _services(module: ModuleType) -> dict[str, type[Any]]:
    found = {name: value for name, value in vars(module).items() if is_service(value)}
    return {spec_of(cls).cls.__name__: cls for cls in found.values()}


def _root_service(module: ModuleType, target: str) -> type[Any]:
    services = _services(module)
    if not services:
        raise ConfigError(f"target {target!r}: {module.__name__} has no service; decorate a class with @service")
    linked = {provider for cls in services.values() for provider in spec_of(cls).links}
    roots = [cls for cls in services.values() if spec_of(cls).links and cls not in linked]
    if not roots:
        roots = [cls for cls in services.values() if cls.__module__ == module.__name__ and cls not in linked]
    if len(roots) != 1:
        names = ", ".join(sorted(cls.__name__ for cls in roots or services.values()))
        raise ConfigError(f"target {target!r}: which service? Give one of them: {target}:NAME, NAME one of {names}")
    return roots[0]


def _choices(module: ModuleType, wanted: str) -> str:
    names = sorted(_services(module))
    if not names:
        return ""
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"; its services: {', '.join(names)}{hint}"


def _kind(value: object) -> str:
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"a {type(value).__name__}"
