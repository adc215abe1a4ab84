"""The request plane's server: one set of endpoints, reached in process, over a Unix socket and over TCP at once."""

from stator.errors import ConfigError
from stator.ids import InstanceId
from stator.transport.base import Endpoint
from stator.transport.dispatch import Dispatcher
from stator.transport.inprocess import InProcessCarrier, InProcessNetwork
from stator.transport.settings import Identity, Listen, TransportSettings


class RequestPlaneServer:
    """Implements transport.base.TransportServer. `listen` says which carriers it has; they share the endpoints."""

    def __init__(
        self,
        identity: Identity,
        listen: Listen,
        *,
        network: InProcessNetwork | None = None,
        settings: TransportSettings | None = None,
    ) -> None:
        """Raises ConfigError for an in-process name without a network."""
        if listen.inproc_name is not None and network is None:
            raise ConfigError(f"inproc_name {listen.inproc_name!r} needs an InProcessNetwork")
        self._settings = settings or TransportSettings()
        self._listen = listen
        self._network = network
        self._dispatcher = Dispatcher(identity)
        self._inprocess: InProcessCarrier | None = None
        self._addresses: list[str] = []

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self._addresses)

    @property
    def instance_id(self) -> InstanceId:
        return self._dispatcher.instance_id

    @instance_id.setter
    def instance_id(self, instance_id: InstanceId) -> None:
        """Calls that mean another instance are refused from now on (STALE_INSTANCE)."""
        self._dispatcher.instance_id = instance_id

    def register(self, endpoint: Endpoint) -> None:
        self._dispatcher.register(endpoint)

    async def start(self) -> None:
        name = self._listen.inproc_name
        if name is not None and self._network is not None:
            self._inprocess = InProcessCarrier(self._dispatcher, self._settings)
            self._network.add(name, self._inprocess)
            self._addresses.append(f"inproc://{name}")

    async def close(self) -> None:
        self._dispatcher.closing = True
        if self._inprocess is not None and self._network is not None and self._listen.inproc_name is not None:
            self._network.remove(self._listen.inproc_name)
            self._inprocess.close()
            self._inprocess = None
        self._addresses.clear()
