"""The request plane: requests and token streams between instances, in process and over sockets.

`base` is the seam. `RequestPlaneServer` and `RequestPlaneClient` implement it on all carriers; `calls` has the
conveniences for what is not per token.
"""

from stator.transport.base import (
    Call,
    Endpoint,
    Handler,
    Lane,
    Sink,
    StreamHandle,
    Target,
    TransportClient,
    TransportServer,
)
from stator.transport.calls import CallTasks, call, stream
from stator.transport.client import RequestPlaneClient
from stator.transport.inprocess import InProcessNetwork
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen, TransportSettings

__all__ = [
    "Call",
    "CallTasks",
    "Endpoint",
    "Handler",
    "Identity",
    "InProcessNetwork",
    "Lane",
    "Listen",
    "RequestPlaneClient",
    "RequestPlaneServer",
    "Sink",
    "StreamHandle",
    "Target",
    "TransportClient",
    "TransportServer",
    "TransportSettings",
    "call",
    "stream",
]
