"""TLS of the request plane: the state machine of one connection, and the files it is made from. Knows no socket.

TLS 1.3, both sides show a certificate of the deployment's authority (docs/adr/0010-node-identity-in-tls.md). The first
byte tells a peer that speaks TLS (0x16) from one that does not (a frame's length begins with 0), so that whichever side
has it off is told in words by the other, instead of an alert or a lost connection.
"""

import contextlib
import ipaddress
import logging
import os
import ssl

from stator.config.node_tls import NodeTls, TlsVerify
from stator.errors import ConfigError, ErrorCode, StatorError

logger = logging.getLogger(__name__)

FIRST_BYTE = 0x16
"""Of a TLS handshake."""
_ALERT = 0x15
_READ_BYTES = 256 * 1024

SETTINGS = "STATOR_TLS_DIR"
_ISSUE = "`stator certs issue` makes a node's files"

_Stamp = tuple[tuple[int, int, int], ...]


class TlsContexts:
    """The contexts of one identity, made again when one of its files has changed: new connections use the new ones.

    Files that cannot be used (half written, say) leave the old ones in place, with a line in the log.
    """

    def __init__(self, tls: NodeTls) -> None:
        """Raises ConfigError for files that cannot be used."""
        self.tls = tls
        self._stamp = self._look()
        self._contexts = _Contexts(tls)
        self._complained: _Stamp | None = None

    def to(self, host: str, peer: str) -> "TlsSession":
        """The caller's end of a connection to a server that was dialled at host."""
        self._refresh()
        # Loopback is this machine, whose processes all have the certificate that is shown there.
        if self.tls.verify is TlsVerify.CA or _is_loopback(host):
            return TlsSession(self._contexts.caller, is_server=False, peer=peer)
        return TlsSession(self._contexts.naming_caller, is_server=False, peer=peer, name=host)

    def accept(self, peer: str) -> "TlsSession":
        """The server's end of one."""
        self._refresh()
        return TlsSession(self._contexts.server, is_server=True, peer=peer)

    def _look(self) -> _Stamp:
        found: list[tuple[int, int, int]] = []
        for file in self.tls.files:
            try:
                status = os.stat(file)
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_mtime_ns, status.st_ino, status.st_size))
        return tuple(found)

    def _refresh(self) -> None:
        stamp = self._look()
        if stamp in (self._stamp, self._complained):
            return
        try:
            self._contexts = _Contexts(self.tls)
        except ConfigError as error:
            self._complained = stamp
            logger.warning("%s; new connections go on with the certificate of before", error)
        else:
            self._stamp, self._complained = stamp, None
            logger.info("the TLS files have changed; new connections use %s", self.tls.cert)


class _Contexts:
    """naming_caller also checks what the server's certificate names."""

    def __init__(self, tls: NodeTls) -> None:
        try:
            self.caller = _context(ssl.PROTOCOL_TLS_CLIENT, tls)
            self.naming_caller = _context(ssl.PROTOCOL_TLS_CLIENT, tls)
            self.naming_caller.check_hostname = True
            self.server = _context(ssl.PROTOCOL_TLS_SERVER, tls)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(tls.files)
            raise ConfigError(f"the TLS files {files} cannot be used together: {error}") from None


def _context(protocol: int, tls: NodeTls) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cafile=tls.ca)
    context.load_cert_chain(tls.cert, tls.key, password=_no_password)
    context.hostname_checks_common_name = False
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        # Every connection proves who it is; resuming one would skip that.
        context.num_tickets = 0
    return context


def _no_password() -> str:
    raise OSError("the key has a password; give one without, which only this user may read")


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class TlsSession:
    """One end of one connection: bytes of the peer in, plain bytes out, and the other way.

    What is to be sent is collected in between; `take` hands it out, also after an error (the alert).
    """

    def __init__(self, context: ssl.SSLContext, *, is_server: bool, peer: str, name: str | None = None) -> None:
        """name: that the peer's certificate must have. peer: for messages to people."""
        self.established = False
        self._is_server = is_server
        self._peer = peer
        self._seen = False
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._in, self._out, server_side=is_server, server_hostname=name)
        if not is_server:
            self._shake()

    def receive(self, data: bytes) -> bytes:
        """The plain bytes in data, none while hands are shaken. Raises StatorError: UNAUTHORIZED for a peer that is not
        one of ours, PROTOCOL for one that speaks no TLS."""
        if not self._seen and data:
            self._seen = True
            if not self._is_server and data[0] not in (FIRST_BYTE, _ALERT):
                raise server_without_tls(self._peer)
        self._in.write(data)
        if not self.established and not self._shake():
            return b""
        parts: list[bytes] = []
        try:
            while part := self._object.read(_READ_BYTES):
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            pass  # The end of the socket follows.
        except ssl.SSLError as error:
            raise self._refused(error) from None
        return b"".join(parts)

    def send(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            view = view[self._object.write(view) :]

    def end(self) -> None:
        """Say that nothing follows."""
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()

    def take(self) -> bytes:
        return self._out.read()

    def _shake(self) -> bool:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise self._refused(error) from None
        self.established = True
        return True

    def _refused(self, error: ssl.SSLError) -> StatorError:
        return StatorError(ErrorCode.UNAUTHORIZED, _explain(error, self._peer, is_server=self._is_server))

    def lost(self) -> StatorError:
        """The socket was closed before hands were shaken, and without a reason."""
        return StatorError(
            ErrorCode.INSTANCE_LOST,
            f"{self._peer} closed the connection while TLS began; its log may say why",
        )


def server_without_tls(peer: str) -> StatorError:
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"{peer} does not use TLS and this process does; give that node a certificate ({_ISSUE}; {SETTINGS}), or "
        f"start this one without",
    )


def caller_without_tls(peer: str) -> StatorError:
    """For the server's log."""
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"{peer} does not use TLS and this server does; give that node a certificate ({_ISSUE}; {SETTINGS})",
    )


def told_to_caller_without_tls() -> StatorError:
    """For the caller, in plain words."""
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"this server takes connections over TLS only; give this node a certificate of the deployment's authority "
        f"({_ISSUE} where the authority is), in {SETTINGS}",
    )


def caller_with_tls(peer: str) -> StatorError:
    return StatorError(
        ErrorCode.UNAUTHORIZED,
        f"{peer} uses TLS and this server does not; give this node a certificate too ({_ISSUE}; {SETTINGS}), or start "
        f"that one without",
    )


_NOT_YET_VALID, _EXPIRED, _PURPOSE, _HOST_MISMATCH, _IP_MISMATCH = 9, 10, 26, 62, 64
_UNKNOWN_ISSUER = {2, 7, 18, 19, 20, 21}

_ALERTS = {
    "CERTIFICATE_EXPIRED": "this node's certificate has expired; issue another (`stator certs issue`), it is read "
    "again without a restart",
    "UNKNOWN_CA": "this node's certificate is not of the authority that it knows; both need one of the same `ca.crt`",
    "CERTIFICATE_REQUIRED": "it was shown no certificate",
    "PROTOCOL_VERSION": "it takes TLS 1.3 or newer",
    "BAD_CERTIFICATE": "this node's certificate does not name the address that it is reached at, or cannot be read; "
    "issue one with --host for that address",
    "DECRYPT_ERROR": "this node's certificate is not of the authority that it knows; both need the same `ca.crt`",
}


def _explain(error: ssl.SSLError, peer: str, *, is_server: bool) -> str:
    """What to do, for the most likely reasons."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {peer} {_explain_certificate(error)}"
    reason = error.reason or ""
    for alert, text in _ALERTS.items():
        if "ALERT" in reason and reason.endswith(alert):
            return f"{peer} refused this node over TLS: {text}"
    if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return f"{peer} shows no certificate, and every node needs one ({_ISSUE}; {SETTINGS})"
    if "UNSUPPORTED_PROTOCOL" in reason or "PROTOCOL_VERSION" in reason:
        return f"{peer} speaks a version of TLS before 1.3"
    what = "is not what TLS expects" if is_server else "did not answer as TLS expects"
    return f"what {peer} sent {what} ({reason or error})"


def _explain_certificate(error: ssl.SSLCertVerificationError) -> str:
    code, said = error.verify_code, error.verify_message
    if code == _EXPIRED:
        return "has expired; on that node, renew it with `stator certs issue`: it is read again without a restart"
    if code == _NOT_YET_VALID:
        return "is not valid yet; check the clocks of both nodes"
    if code in (_HOST_MISMATCH, _IP_MISMATCH):
        return (
            f"does not name the address it was dialled at ({said}); issue it with --host for every address that "
            f"the node advertises, or set STATOR_TLS_VERIFY=ca if its authority signs for this deployment alone"
        )
    if code in _UNKNOWN_ISSUER:
        return f"is not of this deployment's authority ({said}); use files that the same `stator certs init` stands for"
    if code == _PURPOSE:
        return "is not for both ends of a connection; it needs serverAuth and clientAuth in its extended key usage"
    return f"is refused: {said}"
