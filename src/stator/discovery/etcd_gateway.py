"""etcd v3 through the HTTP/JSON gateway that every member has: several members, who we are, TLS, and what errors mean.

A call is tried at the member that answered last, then at the others, until its time is over. What a member answers
about the call itself (no such lease, not permitted) is final; that it is not reachable or has no leader is not.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from random import Random
from typing import Any, TypeVar

import aiohttp
import msgspec

from stator.config.external import EtcdSettings
from stator.errors import DECODE_ERRORS, ErrorCode, StatorError
from stator.hub.client import Backoff
from stator.runtime.context import loop_time

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_MESSAGE_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 2.0
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}

# Codes of gRPC, which the gateway passes on.
_INVALID_ARGUMENT, _DEADLINE, _NOT_FOUND, _PERMISSION, _EXHAUSTED, _FAILED_PRECONDITION = 3, 4, 5, 7, 8, 9
_UNKNOWN, _UNAVAILABLE, _UNAUTHENTICATED = 2, 14, 16
_ELSEWHERE = {_DEADLINE, _UNAVAILABLE, _UNKNOWN}
_OLD_TOKEN = ("invalid auth token", "revision of auth store is old")
_NOT_US = ("user name is empty", "authentication failed")


class _ErrorBody(msgspec.Struct):
    """grpc_code: in streams."""

    message: str = ""
    code: int = 0
    grpc_code: int = 0


class _StreamItem(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: _ErrorBody | None = None


class _Authenticated(msgspec.Struct):
    token: str


class Failure(Exception):
    """One member's answer to one try.

    final: no other member would say anything else. old_token: a new one may help. exists: what was to be made is there.
    """

    def __init__(
        self, code: ErrorCode, message: str, *, final: bool, old_token: bool = False, exists: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.final = final
        self.old_token = old_token
        self.exists = exists


def decode(data: bytes | msgspec.Raw, kind: type[T]) -> T:
    """The gateway writes 64-bit numbers as strings and leaves out what is zero. Raises Failure."""
    try:
        return msgspec.json.decode(data, type=kind, strict=False)
    except DECODE_ERRORS as error:
        raise Failure(ErrorCode.PROTOCOL, f"an answer that is not etcd's ({error})", final=True) from None


class EtcdGateway:
    """Connects on the first call. settings: where and who we are. timeout_s: for a call, over all members."""

    def __init__(self, settings: EtcdSettings, *, timeout_s: float, random_source: Random) -> None:
        self.settings = settings
        self.timeout_s = timeout_s
        self.random_source = random_source
        self.closed = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self._ssl = _tls(settings)
        self._current = random_source.randrange(len(settings.endpoints))
        self._auth_token: str | None = None

    @property
    def name(self) -> str:
        """For messages to people."""
        return f"etcd at {', '.join(self.settings.endpoints)}"

    @property
    def current(self) -> str:
        """The member to be asked first."""
        return self.settings.endpoints[self._current]

    def leave(self, endpoint: str) -> None:
        """Ask another member first from now on, unless that has been done."""
        if endpoint == self.current:
            self._current = (self._current + 1) % len(self.settings.endpoints)

    async def call(
        self,
        path: str,
        body: Mapping[str, Any],
        kind: type[T],
        *,
        timeout_s: float | None = None,
        exists: T | None = None,
        only: str | None = None,
    ) -> tuple[T, bool]:
        """The answer, and whether an earlier try of this call may have been carried out as well.

        only: ask this member and no other. exists: the answer if a second try finds that the first has made it.
        Raises StatorError; INSTANCE_LOST, with every member's reason, if none answered within timeout_s.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = loop_time() + timeout_s
        backoff = Backoff(self.random_source)
        reasons: dict[str, str] = {}
        tried = renewed = False
        while True:
            self._check_open()
            endpoint = only or self.current
            try:
                left_s = deadline - loop_time()
                data = await self._try(endpoint, path, body, left_s if only else self._share(left_s))
                return decode(data, kind), tried
            except Failure as failure:
                if failure.old_token and not renewed:
                    # Once: a token that is refused as soon as it is made is not an old one.
                    renewed, self._auth_token = True, None
                    continue
                if failure.exists and tried and exists is not None:
                    return exists, True
                if failure.final:
                    raise self._final(failure, endpoint) from None
                reasons[endpoint] = failure.message
                tried = True
                if not only:
                    self.leave(endpoint)
            if only or len(reasons) == len(self.settings.endpoints):
                await self._pause(min(backoff.next_s(), max(0.0, deadline - loop_time())))
            if loop_time() >= deadline - 0.001:
                raise self._unreachable(path, reasons, timeout_s)

    @contextlib.asynccontextmanager
    async def stream(self, endpoint: str, path: str, body: Mapping[str, Any]) -> AsyncGenerator["EtcdStream"]:
        """An endless answer of one member. Raises StatorError: INSTANCE_LOST for what another try may change."""
        self._check_open()
        try:
            token = await self._token(endpoint, self.timeout_s)
            timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S)
            async with self._open().post(
                endpoint + path, data=msgspec.json.encode(body), headers=_headers(token), timeout=timeout, ssl=self._ssl
            ) as response:
                if response.status != 200:
                    raise _explain(response.status, await response.read(), self.settings)
                yield EtcdStream(response.content)
        except Failure as failure:
            if failure.old_token:
                self._auth_token = None
            elif failure.final:
                raise self._final(failure, endpoint) from None
            raise StatorError(ErrorCode.INSTANCE_LOST, f"{endpoint}: {failure.message}") from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._check_open()
            raise StatorError(ErrorCode.INSTANCE_LOST, f"{endpoint}: {_text(error)}") from error

    async def close(self) -> None:
        self.closed.set()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _pause(self, wait_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self.closed.wait()

    def _share(self, left_s: float) -> float:
        """So that a member which takes connections and says nothing leaves time for the others."""
        return max(0.05, left_s / min(len(self.settings.endpoints), 3))

    async def _try(self, endpoint: str, path: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                token = await self._token(endpoint, timeout_s)
                return await self._post(endpoint, path, body, token)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._check_open()
            raise Failure(ErrorCode.INSTANCE_LOST, _text(error), final=False) from error

    async def _post(self, endpoint: str, path: str, body: Mapping[str, Any], token: str | None) -> bytes:
        async with self._open().post(
            endpoint + path, data=msgspec.json.encode(body), headers=_headers(token), ssl=self._ssl
        ) as response:
            data = await response.read()
            if response.status != 200:
                raise _explain(response.status, data, self.settings)
            return data

    async def _token(self, endpoint: str, timeout_s: float) -> str | None:
        settings = self.settings
        if settings.user is None:
            return None
        if self._auth_token is None:
            credentials = {"name": settings.user, "password": settings.password or ""}
            async with asyncio.timeout(timeout_s):
                data = await self._post(endpoint, "/v3/auth/authenticate", credentials, None)
            self._auth_token = decode(data, _Authenticated).token
        return self._auth_token

    def _open(self) -> aiohttp.ClientSession:
        self._check_open()
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, socket_factory=_socket)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        return self._session

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise StatorError(ErrorCode.INSTANCE_LOST, f"this client of {self.name} is closed")

    def _final(self, failure: Failure, endpoint: str) -> StatorError:
        return StatorError(failure.code, f"etcd at {endpoint}: {failure.message}")

    def _unreachable(self, path: str, reasons: Mapping[str, str], timeout_s: float) -> StatorError:
        said = "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items()) or self.name
        return StatorError(
            ErrorCode.INSTANCE_LOST,
            f"etcd did not answer {path} within {timeout_s:g} s ({said}); check that it runs, has a leader, and that "
            f"this host may reach it (ETCD_ENDPOINTS)",
        )


class EtcdStream:
    """One JSON object a line, of any length up to MAX_MESSAGE_BYTES."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._buffer = bytearray()

    async def next(self, kind: type[T]) -> T:
        """May be cancelled and called again. Raises Failure for an error or the end of the stream."""
        while (end := self._buffer.find(b"\n")) < 0:
            chunk = await self._content.readany()
            if not chunk:
                raise Failure(ErrorCode.INSTANCE_LOST, "the stream ended", final=False)
            self._buffer += chunk
            if len(self._buffer) > MAX_MESSAGE_BYTES:
                raise Failure(ErrorCode.PROTOCOL, f"a message of more than {MAX_MESSAGE_BYTES} bytes", final=True)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        item = decode(line, _StreamItem)
        if item.error is not None:
            raise _failure(item.error.grpc_code or item.error.code, item.error.message, None)
        return decode(item.result, kind)


def _headers(token: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    return headers if token is None else {**headers, "Authorization": token}


def _explain(status: int, data: bytes, settings: EtcdSettings) -> Failure:
    try:
        error = decode(data, _ErrorBody)
    except Failure:
        if status == 404:
            return Failure(
                ErrorCode.PROTOCOL,
                "has no HTTP/JSON gateway: /v3 answers 404. A member that is started from a configuration file needs "
                "`enable-grpc-gateway: true` in it; and the address must be that of clients, not of peers",
                final=True,
            )
        return Failure(ErrorCode.INSTANCE_LOST, f"answered HTTP {status}", final=False)
    return _failure(error.code, error.message, settings)


def _failure(code: int, message: str, settings: EtcdSettings | None) -> Failure:
    said = message or f"gRPC code {code}"
    if any(text in message for text in _OLD_TOKEN):
        return Failure(ErrorCode.UNAUTHORIZED, said, final=True, old_token=True)
    if any(text in message for text in _NOT_US):
        who = "no user is given" if settings is None or settings.user is None else f"user {settings.user} is refused"
        hint = "set ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD"
        return Failure(ErrorCode.UNAUTHORIZED, f"{said}: {who}; {hint}", final=True)
    if code == _PERMISSION:
        who = "this user" if settings is None or settings.user is None else f"user {settings.user}"
        hint = f"{who} needs a role with read and write permission for the prefix /stator/"
        return Failure(ErrorCode.UNAUTHORIZED, f"{said}: {hint}", final=True)
    if code == _UNAUTHENTICATED:
        return Failure(ErrorCode.UNAUTHORIZED, said, final=True)
    if code == _NOT_FOUND:
        return Failure(ErrorCode.NOT_FOUND, said, final=True)
    if code == _EXHAUSTED:
        return Failure(
            ErrorCode.OVERLOADED, f"{said}; `etcdctl alarm list` says whether it is out of space", final=True
        )
    if code == _INVALID_ARGUMENT:
        return Failure(ErrorCode.INVALID_REQUEST, said, final=True)
    if code == _FAILED_PRECONDITION:
        return Failure(ErrorCode.INVALID_REQUEST, said, final=True, exists="already exists" in message)
    if code in _ELSEWHERE:
        return Failure(ErrorCode.INSTANCE_LOST, said, final=False)
    return Failure(ErrorCode.PROTOCOL, said, final=True)


def _text(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__


def _tls(settings: EtcdSettings) -> ssl.SSLContext | bool:
    tls = settings.tls
    return True if tls is None else tls.context()


def _socket(address: Any) -> socket.socket:
    """Kept alive by the kernel: a watch has nothing to say for hours, and a host that is gone says nothing at all."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if (option := getattr(socket, name, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
