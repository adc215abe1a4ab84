"""One connection to NATS, made again whenever it is lost, and JetStream's API over it.

nats-py's own reconnection is not used: it keeps what was written while nobody was there and sends it later, and a put
that was given up must not be carried out after its job was done elsewhere.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

import msgspec
from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from stator.config.external import NatsSettings
from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.hub.client import Backoff
from stator.runtime.context import loop_time
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONNECT_TIMEOUT_S = 2
PING_INTERVAL_S = 5
MAX_PINGS_OUT = 2
MAX_BACKOFF_S = 1.0
CHECK_S = 1.0

_VIOLATION = re.compile(r"permissions violation for publish to \"([^\"]+)\"", re.IGNORECASE)

Listener = Callable[[bool], None]


class ApiError(msgspec.Struct, frozen=True):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: ApiError | None = None


class JetStreamError(Exception):
    """What JetStream answered to a request that it could read."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(f"{error.description} ({error.err_code})")
        self.error = error


class NoResponders(Exception):
    """Nobody listens to the subject: there is no such stream, or no JetStream."""


@dataclass(eq=False, slots=True)
class _Asking:
    """A request on its way. forbidden: the server has said so."""

    subject: str
    scope: asyncio.Timeout | None = None
    forbidden: bool = False

    def give_up(self) -> None:
        if self.scope is not None:
            self.scope.reschedule(loop_time())


class NatsConnection:
    """Shared by the queues of a process. It connects when it is first used, and until `close` again and again."""

    def __init__(self, settings: NatsSettings, *, timeout_s: float, random_source: Random) -> None:
        self.settings = settings
        self.timeout_s = timeout_s
        self.random_source = random_source
        self._client: Client | None = None
        self._tasks = TaskOwner("NATS connection")
        self._keeper: asyncio.Task[None] | None = None
        self._up = asyncio.Event()
        self._gone = asyncio.Event()
        self._closed = asyncio.Event()
        self._asking: set[_Asking] = set()
        self._listeners: list[Listener] = []
        self._reasons: dict[str, str] = {}
        self._refused = False
        self._detail: Exception | None = None

    @property
    def name(self) -> str:
        """For messages to people."""
        return f"NATS at {', '.join(self.settings.servers)}"

    @property
    def is_up(self) -> bool:
        return self._up.is_set()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    @property
    def max_payload_bytes(self) -> int:
        return self._client.max_payload if self._client is not None else 1 << 20

    def on_change(self, listener: Listener) -> Callable[[], None]:
        """Calls listener with True for a connection that was made and False for one that was lost. Returns its end."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def start(self) -> None:
        """Begin to connect. Idempotent."""
        if self._keeper is None and not self.closed:
            self._keeper = self._tasks.spawn(self._keep(), "keep")

    async def wait_up(self) -> None:
        self.start()
        await self._up.wait()

    async def request(
        self, subject: str, payload: bytes, *, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> Msg:
        """One try. Raises StatorError(INSTANCE_LOST) without an answer in time, at once if the connection is lost;
        UNAUTHORIZED if no server lets us in, or our user may not publish there; NoResponders."""
        self._check_open()
        self.start()
        asking = _Asking(subject)
        try:
            async with asyncio.timeout(timeout_s) as asking.scope:
                self._asking.add(asking)
                try:
                    if self._refused and not self.is_up:
                        raise self._refusal()
                    await self._up.wait()
                    assert self._client is not None
                    own = None if headers is None else dict(headers)
                    return await self._client.request(subject, payload, timeout=timeout_s + 1.0, headers=own)
                finally:
                    self._asking.discard(asking)
        except errors.NoRespondersError:
            raise NoResponders(subject) from None
        except (TimeoutError, errors.Error, OSError, asyncio.InvalidStateError) as error:
            self._check_open()
            if asking.forbidden:
                raise self._forbids(subject) from error
            raise self.lost(f"did not answer within {timeout_s:g} s" if self.is_up else _text(error)) from error

    async def api(self, call: str, body: Any, kind: type[T], *, timeout_s: float | None = None) -> T:
        """A request to JetStream's API. Raises JetStreamError, and StatorError as `request`."""
        payload = b"" if body is None else msgspec.json.encode(body)
        try:
            answer = await self.request(f"$JS.API.{call}", payload, timeout_s=timeout_s or self.timeout_s)
        except NoResponders:
            raise StatorError(
                ErrorCode.PROTOCOL,
                f"{self.name} has no JetStream: start nats-server with -js, or with a `jetstream` block in its "
                f"configuration, and allow it for this account",
            ) from None
        try:
            if (error := msgspec.json.decode(answer.data, type=_Answer).error) is not None:
                raise JetStreamError(error)
            return msgspec.json.decode(answer.data, type=kind)
        except DECODE_ERRORS:
            raise StatorError(ErrorCode.PROTOCOL, f"{self.name}: an answer that is not JetStream's") from None

    async def subscribe(self, subject: str, callback: Callable[[Msg], Awaitable[None]]) -> Subscription:
        """On the present connection; it ends with that. Raises StatorError(INSTANCE_LOST) without one."""
        if self._client is None or not self.is_up:
            raise self.lost("is not reachable")
        try:
            return await self._client.subscribe(subject, cb=callback)
        except errors.Error as error:
            raise self.lost(_text(error)) from error

    def new_inbox(self) -> str:
        assert self._client is not None
        return self._client.new_inbox()

    def lost(self, why: str) -> StatorError:
        said = "".join(f"; {server}: {reason}" for server, reason in self._reasons.items())
        message = f"{self.name} {why}{said}; check that it runs and that this host may reach it (NATS_SERVER)"
        return StatorError(ErrorCode.INSTANCE_LOST, message)

    async def pause(self, wait_s: float) -> None:
        """Returns after wait_s, or when this is closed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._closed.wait()

    async def close(self) -> None:
        self._closed.set()
        await self._tasks.close()
        client, self._client = self._client, None
        self._set_up(False)
        if client is not None:
            with contextlib.suppress(errors.Error, OSError):
                await client.close()

    def _check_open(self) -> None:
        if self.closed:
            raise StatorError(ErrorCode.INSTANCE_LOST, f"this client of {self.name} is closed")

    def _refusal(self) -> StatorError:
        said = "; ".join(f"{server}: {reason}" for server, reason in self._reasons.items())
        return StatorError(
            ErrorCode.UNAUTHORIZED,
            f"{self.name} does not let us in ({said}); set one of NATS_AUTH_USERNAME and NATS_AUTH_PASSWORD, "
            f"NATS_AUTH_TOKEN, NATS_AUTH_NKEY, NATS_AUTH_CREDENTIALS_FILE",
        )

    def _forbids(self, subject: str) -> StatorError:
        return StatorError(
            ErrorCode.UNAUTHORIZED,
            f"{self.name} does not let our user publish on {subject}; give it the user of its node's role "
            f"(NATS_AUTH_USERNAME, docs/guide/security.md)",
        )

    async def _keep(self) -> None:
        backoff = Backoff(self.random_source, MAX_BACKOFF_S)
        servers = list(self.settings.servers)
        self.random_source.shuffle(servers)
        number = 0
        while not self.closed:
            server = servers[number % len(servers)]
            number += 1
            if await self._connect(server):
                backoff.reset()
                await self._until_gone()
                if not self.closed:
                    logger.warning("lost the connection to NATS at %s; connecting again", server)
            if number % len(servers) == 0 or self._client is None:
                await self.pause(backoff.next_s())

    async def _until_gone(self) -> None:
        """nats-py does not call back if its last words to a broken connection fail."""
        client = self._client
        while not self._gone.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_S):
                    await self._gone.wait()
            if client is None or client.is_closed:
                await self._on_closed()
        # Nor does it close the connection then.
        transport = getattr(client, "_transport", None)
        if transport is not None:
            transport.close()

    async def _connect(self, server: str) -> bool:
        """Whether it has worked."""
        client = Client()
        self._detail = None
        self._gone.clear()
        try:
            await client.connect(server, **self._options())
        except (errors.Error, OSError, TimeoutError, ValueError) as error:
            self._failed(server, self._detail or error if isinstance(error, errors.NoServersError) else error)
            with contextlib.suppress(Exception):
                await client.close()
            return False
        if self.closed:
            await client.close()
            return False
        self._reasons.clear()
        self._refused = False
        self._client = client
        self._set_up(True)
        return True

    def _failed(self, server: str, error: BaseException) -> None:
        if server not in self._reasons:
            logger.warning("could not connect to NATS at %s, trying again: %s", server, _text(error))
        self._reasons[server] = _text(error)
        refused = isinstance(error, errors.AuthorizationError) or "uthorization" in _text(error)
        if refused:
            self._refused = True
            for asking in list(self._asking):
                asking.give_up()

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "allow_reconnect": False,
            # Or it would try on by itself, every two seconds, while it says that it connects.
            "max_reconnect_attempts": 1,
            "reconnect_time_wait": 0.05,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "ping_interval": PING_INTERVAL_S,
            "max_outstanding_pings": MAX_PINGS_OUT,
            "error_cb": self._on_error,
            "closed_cb": self._on_closed,
            "name": "stator",
        }
        given = {
            "user": settings.user,
            "password": settings.password,
            "token": settings.token,
            "nkeys_seed": settings.nkey_file,
            "user_credentials": settings.credentials_file,
            "tls": None if settings.tls is None else settings.tls.context(),
        }
        return options | {name: value for name, value in given.items() if value is not None}

    async def _on_error(self, error: Exception) -> None:
        self._detail = error
        logger.debug("NATS: %s", _text(error))
        # The server names the subject, not the request; nats-py may tell it in small letters.
        if (found := _VIOLATION.search(_text(error))) is not None:
            for asking in self._asking:
                if asking.subject.lower() == found[1].lower():
                    asking.forbidden = True
                    asking.give_up()

    async def _on_closed(self) -> None:
        self._client = None
        self._set_up(False)

    def _set_up(self, up: bool) -> None:
        if up == self._up.is_set():
            return
        if up:
            self._up.set()
        else:
            self._up.clear()
            self._gone.set()
            for asking in list(self._asking):
                asking.give_up()
        for listener in list(self._listeners):
            listener(up)


def _text(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
