"""The endpoints of one server, shared by its carriers: who is called, may it be called, and what if it raises."""

from typing import Any

import msgspec

from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.ids import InstanceId
from stator.transport.base import Endpoint
from stator.transport.refusals import stale_instance
from stator.transport.server_call import ServerCall
from stator.transport.settings import Identity


class Dispatcher:
    """instance_id may change while the server runs: an instance that lost its lease comes back under another."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.instance_id = identity.instance_id
        self.closing = False
        self._endpoints: dict[str, Endpoint] = {}
        self._decoders: dict[str, msgspec.msgpack.Decoder[Any]] = {}

    def register(self, endpoint: Endpoint) -> None:
        if endpoint.name in self._endpoints:
            raise ValueError(f"endpoint {endpoint.name} is already registered")
        self._decoders[endpoint.name] = msgspec.msgpack.Decoder(endpoint.request_type)
        self._endpoints[endpoint.name] = endpoint

    def find(self, name: str, instance_id: InstanceId | str | None) -> Endpoint:
        """Raises StatorError: DRAINING, STALE_INSTANCE, NOT_FOUND."""
        if self.closing:
            raise StatorError(ErrorCode.DRAINING, f"instance {self.instance_id} is stopping")
        if instance_id is not None and instance_id != self.instance_id:
            raise stale_instance(instance_id, self.instance_id)
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            known = ", ".join(sorted(self._endpoints)) or "none"
            raise StatorError(
                ErrorCode.NOT_FOUND, f"instance {self.instance_id} has no endpoint {name}; its endpoints: {known}"
            )
        return endpoint

    def decode_request(self, endpoint: Endpoint, encoded: bytes | msgspec.Raw) -> Any:
        """Raises StatorError(PROTOCOL) naming the field that does not fit."""
        try:
            return self._decoders[endpoint.name].decode(encoded)
        except DECODE_ERRORS as error:
            raise StatorError(ErrorCode.PROTOCOL, f"{endpoint.name} cannot read its request: {error}") from error

    def run(self, endpoint: Endpoint, call: ServerCall) -> None:
        try:
            endpoint.handler(call)
        except Exception as error:
            call.fail(error)
