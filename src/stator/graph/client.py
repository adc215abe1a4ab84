"""What a `depends` attribute becomes in a running service: a way to call the other service's instances."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any, Protocol
from uuid import uuid4

from stator.errors import ErrorCode, StatorError
from stator.graph.service import ServiceSpec
from stator.ids import InstanceId, RequestId
from stator.messages.instances import InstanceInfo
from stator.runtime.context import CallContext
from stator.transport import calls
from stator.transport.base import Sink, StreamHandle, Target, TransportClient


class Instances(Protocol):
    """The part of InstanceDirectory that callers need."""

    def instances(self, *, role: str | None = None) -> Sequence[InstanceInfo]:
        """Those that are ready."""
        ...


class ServiceClient:
    """Calls instances of one service: the one in this process if there is one, else those that discovery shows.

    Instances are found by the service's role, so that another class with the same role may take its place. Calls
    without a `target` go round the instances in turn.

    Any other attribute is an endpoint: `await client.echo(request)` for its one answer, or
    `async for items in client.count(request)` for its stream, in lists as they come.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        *,
        linked: bool,
        client: TransportClient,
        instances: Instances,
        colocated: Callable[[], tuple[InstanceId, tuple[str, ...]] | None],
    ) -> None:
        self.service = spec.name
        self.role = spec.role
        self.linked = linked
        self._item_types = {endpoint.name: endpoint.item_type for endpoint in spec.endpoints}
        self._client = client
        self._instances = instances
        self._colocated = colocated
        self._turn = 0
        self._local_targets: dict[str, Target] = {}

    def targets(self, endpoint: str) -> list[Target]:
        """Every instance that can be called now; empty if there is none."""
        if (local := self._colocated()) is not None:
            target = self._local_targets.get(endpoint)
            if target is None or (target.instance_id, target.addresses) != local:
                instance_id, addresses = local
                target = self._local_targets[endpoint] = Target(addresses, endpoint, instance_id)
            return [target]
        return [
            Target(info.addresses, endpoint, info.instance_id)
            for info in self._instances.instances(role=self.role)
            if endpoint in info.endpoints
        ]

    def target(self, endpoint: str) -> Target:
        """The next instance in turn. Raises StatorError(NO_INSTANCE)."""
        targets = self.targets(endpoint)
        if not targets:
            raise StatorError(ErrorCode.NO_INSTANCE, f"no instance of {self.service} serves {endpoint!r} now")
        self._turn += 1
        return targets[self._turn % len(targets)]

    def open(
        self,
        endpoint: str,
        request: Any,
        sink: Sink,
        *,
        context: CallContext | None = None,
        item_type: Any = None,
        target: Target | None = None,
    ) -> StreamHandle:
        """As TransportClient.open: never raises for want of an instance; NO_INSTANCE arrives at the sink."""
        if target is None:
            try:
                target = self.target(endpoint)
            except StatorError as error:
                return _Refused(sink, error)
        return self._client.open(
            target, request, sink, context=context or _new_context(), item_type=self._item_type(endpoint, item_type)
        )

    async def call(
        self,
        endpoint: str,
        request: Any,
        *,
        context: CallContext | None = None,
        item_type: Any = None,
        target: Target | None = None,
    ) -> Any:
        """The endpoint's one answer. Raises StatorError."""
        return await calls.call(
            self._client,
            target or self.target(endpoint),
            request,
            context=context or _new_context(),
            item_type=self._item_type(endpoint, item_type),
        )

    def stream(
        self,
        endpoint: str,
        request: Any,
        *,
        context: CallContext | None = None,
        item_type: Any = None,
        target: Target | None = None,
    ) -> AsyncIterator[Sequence[Any]]:
        """The endpoint's items, in lists as they come. Raises StatorError, at the latest when iterated."""
        return calls.stream(
            self._client,
            target or self.target(endpoint),
            request,
            context=context or _new_context(),
            item_type=self._item_type(endpoint, item_type),
        )

    def _item_type(self, endpoint: str, item_type: Any) -> Any:
        return self._item_types.get(endpoint, Any) if item_type is None else item_type

    def __getattr__(self, name: str) -> Callable[..., "PendingCall"]:
        if name.startswith("_") or name not in self._item_types:
            known = ", ".join(sorted(self._item_types)) or "none"
            raise AttributeError(f"{self.service} has no endpoint {name!r} (it has {known})")

        def start(request: Any, *, context: CallContext | None = None) -> PendingCall:
            return PendingCall(self, name, request, context)

        return start


class PendingCall:
    """A call that starts when it is awaited or iterated; do one of the two, once."""

    def __init__(self, client: ServiceClient, endpoint: str, request: Any, context: CallContext | None) -> None:
        self._client = client
        self._endpoint = endpoint
        self._request = request
        self._context = context

    def __await__(self) -> Generator[Any, None, Any]:
        return self._client.call(self._endpoint, self._request, context=self._context).__await__()

    def __aiter__(self) -> AsyncIterator[Sequence[Any]]:
        return self._client.stream(self._endpoint, self._request, context=self._context)


class _Refused:
    """The handle of a stream that found no instance; its sink ends in the next iteration of the loop."""

    def __init__(self, sink: Sink, error: StatorError) -> None:
        asyncio.get_running_loop().call_soon(sink.end, error)

    def cancel(self) -> None:
        pass

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


def _new_context() -> CallContext:
    return CallContext(RequestId(uuid4().hex))
