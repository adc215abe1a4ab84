"""Services as plain classes: what decorators note about them, and how they are linked into a graph.

`@service` leaves the class itself in place: it can be instantiated, subclassed and tested like any other. What was
declared (endpoints, dependencies, hooks) is found once, when the class is decorated, and kept in a `ServiceSpec`.

    @service(role="greeter")
    class Greeter:
        names = depends(Names)

        @on_start
        async def start(self, context: ServiceContext) -> None: ...

        @endpoint
        async def greet(self, request: Hello) -> AsyncIterator[str]: ...

    Greeter.link(Names)
"""

import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin, get_type_hints, overload

from stator.errors import ConfigError

if TYPE_CHECKING:
    from stator.graph.client import ServiceClient

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_SPEC = "__stator_service__"
_ENDPOINT = "__stator_endpoint__"
_HOOK = "__stator_hook__"
_STREAMS = (AsyncIterator, AsyncGenerator, AsyncIterable)


class EndpointStyle(StrEnum):
    """PUSH: `def f(self, call)` fills the call. STREAM: an async generator. SINGLE: `async def`, one answer."""

    PUSH = "push"
    STREAM = "stream"
    SINGLE = "single"


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """attribute: the method's name. request_type, item_type: what requests and items are decoded to.

    takes_context: the method wants the CallContext as its second argument.
    """

    name: str
    attribute: str
    style: EndpointStyle
    request_type: Any
    item_type: Any
    takes_context: bool = False


@dataclass(slots=True)
class ServiceSpec:
    """What a service class declares. `links` grows as `link` is called; everything else is fixed.

    role: what callers use it for. colocate: runs in its consumer's process unless the configuration says otherwise.
    config_type: struct its section is decoded to; None for the schema of that name, or a plain dict without one.
    dependencies: attribute name to service class.
    """

    cls: type[Any]
    name: str
    role: str
    colocate: bool
    config_type: type[Any] | None
    endpoints: tuple[EndpointSpec, ...]
    dependencies: dict[str, type[Any]]
    start_hooks: tuple[str, ...]
    drain_hooks: tuple[str, ...]
    stop_hooks: tuple[str, ...]
    links: list[type[Any]] = field(default_factory=list[type[Any]])


class Dependency:
    """What `depends` leaves in the class. An instance that runs has a ServiceClient in its place."""

    def __init__(self, service: type[Any]) -> None:
        self.service = service
        self.attribute = ""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self.attribute = name

    def __get__(self, instance: object | None, owner: type[Any]) -> "Dependency":
        if instance is None:
            return self
        raise RuntimeError(
            f"{owner.__name__}.{self.attribute} is connected when the service is started by `stator serve`, "
            f"before its on_start hooks; it was read before that"
        )


@dataclass(frozen=True, slots=True)
class _EndpointMark:
    name: str | None
    request: Any
    item: Any


def is_service(value: object) -> bool:
    """A subclass of a service is one only if it is decorated itself."""
    return isinstance(value, type) and _SPEC in vars(value)


def spec_of(service_class: type[Any]) -> ServiceSpec:
    """Raises ConfigError if the class is not decorated with @service."""
    if not is_service(service_class):
        raise ConfigError(f"{_name(service_class)} is not a service: decorate the class with @service")
    return cast(ServiceSpec, vars(service_class)[_SPEC])


def depends(service: type[Any]) -> "ServiceClient":
    """Declare, as a class attribute, that this service calls another; active once the other is linked."""
    if not is_service(service):
        raise ConfigError(f"depends({_name(service)}): not a service; decorate the class with @service")
    return cast("ServiceClient", Dependency(service))


@overload
def service(cls: type[T], /) -> type[T]: ...
@overload
def service(
    *, name: str | None = None, role: str | None = None, colocate: bool = False, config: type[Any] | None = None
) -> Callable[[type[T]], type[T]]: ...
def service(
    cls: type[T] | None = None,
    /,
    *,
    name: str | None = None,
    role: str | None = None,
    colocate: bool = False,
    config: type[Any] | None = None,
) -> type[T] | Callable[[type[T]], type[T]]:
    """Make a class a service.

    name: of its configuration section, in logs and in discovery; default the class's name. role: what callers use it
    for, default the name in lower case. colocate: run in the consumer's process by default. config: a msgspec struct
    for its section of the configuration; default the built-in schema of that name, else a plain dict.
    """

    def decorate(cls: type[T]) -> type[T]:
        service_name = name or cls.__name__
        setattr(cls, _SPEC, _inspect(cls, service_name, role or service_name.lower(), colocate, config))
        if "link" not in vars(cls):
            setattr(cls, "link", classmethod(link))  # noqa: B010
        return cls

    return decorate if cls is None else decorate(cls)


def link(consumer: type[Any], provider: type[T]) -> type[T]:
    """Make `provider` part of every graph that `consumer` is part of. Returns provider, so that links chain.

    Raises ConfigError if consumer does not depend on provider or on a class that provider derives from.
    """
    spec, other = spec_of(consumer), spec_of(provider)
    if not any(issubclass(provider, declared) for declared in spec.dependencies.values()):
        declared = ", ".join(spec_of(d).name for d in spec.dependencies.values()) or "nothing"
        raise ConfigError(
            f"{spec.name}.link({other.name}): {spec.name} does not depend on {other.name} (it depends on {declared}); "
            f"add `depends({other.name})` to {spec.name}, or link {other.name} to the service that calls it"
        )
    if provider not in spec.links:
        spec.links.append(provider)
    return provider


@overload
def endpoint(method: F, /) -> F: ...
@overload
def endpoint(*, name: str | None = None, request: Any = None, item: Any = None) -> Callable[[F], F]: ...
def endpoint(
    method: F | None = None, /, *, name: str | None = None, request: Any = None, item: Any = None
) -> F | Callable[[F], F]:
    """Make a method callable from other services.

    `async def f(self, request: T) -> AsyncIterator[U]` streams, `async def f(self, request: T) -> U` answers once;
    types come from the annotations. Either may take the CallContext as a second argument.
    `def f(self, call: Call) -> None` takes the stream itself and returns at once; for it, `request` names the
    request's type and `item`, if given, the items'.
    """

    def mark(method: F) -> F:
        setattr(method, _ENDPOINT, _EndpointMark(name, request, item))
        return method

    return mark if method is None else mark(method)


def on_start(method: F) -> F:
    """Runs before the instance is announced; takes the ServiceContext, or nothing. The process fails if it raises."""
    return _hook(method, "start")


def on_drain(method: F) -> F:
    """Runs when the instance has left discovery and should finish what it has; may take as long as the grace lasts."""
    return _hook(method, "drain")


def on_stop(method: F) -> F:
    """Runs last, drained or not, if all on_start hooks of the service succeeded."""
    return _hook(method, "stop")


def _hook(method: F, kind: str) -> F:
    setattr(method, _HOOK, kind)
    return method


def _name(value: object) -> str:
    return getattr(value, "__qualname__", repr(value))


def _inspect(cls: type[Any], name: str, role: str, colocate: bool, config: type[Any] | None) -> ServiceSpec:
    endpoints: dict[str, EndpointSpec] = {}
    dependencies: dict[str, type[Any]] = {}
    hooks: dict[str, list[str]] = {"start": [], "drain": [], "stop": []}
    for attribute, value in _members(cls).items():
        if isinstance(value, Dependency):
            dependencies[attribute] = value.service
        mark = getattr(value, _ENDPOINT, None)
        if isinstance(mark, _EndpointMark):
            spec = _endpoint_spec(cls, attribute, value, mark)
            if spec.name in endpoints:
                raise ConfigError(f"{cls.__qualname__} has two endpoints named {spec.name!r}")
            endpoints[spec.name] = spec
        if (kind := getattr(value, _HOOK, None)) in hooks and callable(value):
            hooks[kind].append(attribute)
    return ServiceSpec(
        cls, name, role, colocate, config, tuple(endpoints.values()), dependencies,
        tuple(hooks["start"]), tuple(hooks["drain"]), tuple(hooks["stop"]),
    )  # fmt: skip


def _members(cls: type[Any]) -> dict[str, Any]:
    """Attributes in definition order, base classes first, overridden ones in their final form."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__[:-1]):
        members.update(vars(base))
    return members


def _endpoint_spec(cls: type[Any], attribute: str, method: Any, mark: _EndpointMark) -> EndpointSpec:
    where = f"{cls.__qualname__}.{attribute}"
    name = mark.name or attribute
    is_generator = inspect.isasyncgenfunction(method)
    if not is_generator and not inspect.iscoroutinefunction(method):
        if mark.request is None:
            raise ConfigError(
                f"endpoint {where}: a push endpoint `def {attribute}(self, call)` needs "
                f"`@endpoint(request=TheRequestType)`; or make it `async def`"
            )
        return EndpointSpec(name, attribute, EndpointStyle.PUSH, mark.request, Any if mark.item is None else mark.item)
    request, item, takes_context = _annotated_types(method, where)
    style = EndpointStyle.STREAM if is_generator else EndpointStyle.SINGLE
    if is_generator:
        item = (get_args(item) or (Any,))[0] if get_origin(item) in _STREAMS else Any
    return EndpointSpec(
        name, attribute, style,
        request if mark.request is None else mark.request,
        item if mark.item is None else mark.item,
        takes_context,
    )  # fmt: skip


def _annotated_types(method: Any, where: str) -> tuple[Any, Any, bool]:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    if len(parameters) not in (1, 2):
        raise ConfigError(
            f"endpoint {where} takes {len(parameters)} arguments besides self; expected (request) or (request, context)"
        )
    try:
        hints = get_type_hints(method)
    except NameError as error:
        raise ConfigError(f"endpoint {where}: its annotations name something unknown: {error}") from None
    return hints.get(parameters[0].name, Any), hints.get("return", Any), len(parameters) == 2
