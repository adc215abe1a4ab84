"""Who is let in over TLS, and what each side says to who is not. The contract suite runs on TLS as well."""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop

from stator.config.authority import issue, make_authority
from stator.config.node_tls import DIR, VERIFY, NodeTls, node_tls
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.ids import InstanceId, RequestId
from stator.runtime.context import CallContext, loop_time
from stator.transport import calls
from stator.transport.base import Call, Endpoint, Target
from stator.transport.client import RequestPlaneClient
from stator.transport.server import RequestPlaneServer
from stator.transport.settings import Identity, Listen
from stator.transport.tls import TlsContexts

TOKEN = "a-token-of-the-tests"
HOST = "127.0.0.1"


class Files:
    """Certificates of one authority."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        make_authority(directory / "ca")

    def node(self, *hosts: str, verify: str = "full", days: int = 30, now: datetime | None = None) -> NodeTls:
        out = self.directory / "-".join(hosts)
        issue(self.directory / "ca", hosts, out, days=days, now=now, replace=True)
        found = node_tls({DIR: str(out), VERIFY: verify})
        assert found is not None
        return found


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "ours")


@pytest.fixture
def others(tmp_path: Path) -> Files:
    return Files(tmp_path / "theirs")


def echo(call: Call) -> None:
    call.items([call.request])
    call.end()


def identity(tls: NodeTls | None, token: str = TOKEN) -> Identity:
    return Identity("ns", InstanceId("i"), "test", token, tls)


def ask(server_tls: NodeTls | None, client_tls: NodeTls | None, *, name: str = HOST, token: str = TOKEN) -> str:
    """What a call comes to: the answer, or code and message of its error. name: by which the server is dialled."""

    async def scene() -> str:
        server = RequestPlaneServer(identity(server_tls), Listen(host=HOST))
        server.register(Endpoint("echo", str, echo))
        await server.start()
        client = RequestPlaneClient(identity(client_tls, token))
        target = Target((server.addresses[0].replace(HOST, name),), "echo")
        context = CallContext(RequestId("r"), loop_time() + 10)
        try:
            return await calls.call(client, target, "hello", context=context, item_type=str)
        except StatorError as error:
            return f"{error.code.value}: {error.message}"
        finally:
            await client.close()
            await server.close()

    return asyncio.run(scene())


def test_two_nodes_of_one_authority(files: Files) -> None:
    assert ask(files.node(HOST), files.node("another")) == "hello"


def test_closing_a_connection_that_is_gone_is_no_error(files: Files) -> None:
    """A server that closes meets connections whose loss it has not handled yet; uvloop does not take their writes."""
    tls = files.node(HOST)

    async def scene() -> None:
        server = RequestPlaneServer(identity(tls), Listen(host=HOST))
        server.register(Endpoint("echo", str, echo))
        await server.start()
        client = RequestPlaneClient(identity(tls))
        context = CallContext(RequestId("r"), loop_time() + 10)
        try:
            await calls.call(client, Target(server.addresses, "echo"), "hello", context=context, item_type=str)
            (connection,) = server._connections
            await client.close()
            await connection.closed
            connection.shut_down()
        finally:
            await server.close()

    uvloop.run(scene())


def test_the_token_is_asked_for_as_well(files: Files) -> None:
    tls = files.node(HOST)
    assert ErrorCode.UNAUTHORIZED.value in ask(tls, tls, token="another")


@pytest.mark.parametrize(
    ("server", "client", "told", "logged"),
    [
        ("ours", "theirs", "is not of this deployment's authority", ""),
        ("ours", None, "this server takes connections over TLS only; give this node a certificate", "does not use TLS"),
        (None, "ours", "does not use TLS and this process does; give that node a certificate", "uses TLS"),
        ("expired", "ours", "has expired; on that node, renew it with `stator certs issue`", ""),
        ("ours", "expired", "this node's certificate has expired; issue another", "has expired"),
        ("early", "ours", "is not valid yet; check the clocks of both nodes", ""),
    ],
)
def test_both_sides_say_why(
    server: str | None,
    client: str | None,
    told: str,
    logged: str,
    files: Files,
    others: Files,
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = datetime.now(UTC)
    made: dict[str | None, Callable[[], NodeTls | None]] = {
        None: lambda: None,
        "ours": lambda: files.node(HOST, "ours"),
        "theirs": lambda: others.node(HOST),
        "expired": lambda: files.node(HOST, "expired", days=1, now=now - timedelta(days=3)),
        "early": lambda: files.node(HOST, "early", now=now + timedelta(days=3)),
    }
    with caplog.at_level(logging.WARNING):
        answer = ask(made[server](), made[client]())
    assert told in answer, answer
    assert logged in caplog.text


def test_a_server_is_held_to_the_name_it_is_dialled_at(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stator.transport.tls._is_loopback", lambda host: False)
    client = files.node("client")
    assert ask(files.node("localhost"), client, name="localhost") == "hello"
    wrong = ask(files.node("elsewhere"), client, name="localhost")
    assert "does not name the address it was dialled at" in wrong and "--host" in wrong
    assert ask(files.node("elsewhere"), files.node("client", verify="ca"), name="localhost") == "hello"


def test_renewed_files_are_taken_without_a_restart(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    tls = files.node(HOST)
    contexts = TlsContexts(tls)
    contexts.accept("a peer")
    first = contexts._contexts
    assert (contexts.accept("a peer"), contexts._contexts)[1] is first
    files.node(HOST)
    with caplog.at_level(logging.INFO):
        contexts.accept("a peer")
    assert contexts._contexts is not first and "the TLS files have changed" in caplog.text
    Path(tls.cert).write_text("half a certific")
    kept = contexts._contexts
    for _ in range(3):
        contexts.to(HOST, "a peer")
    assert contexts._contexts is kept
    assert caplog.text.count("new connections go on with the certificate of before") == 1


def test_files_that_do_not_fit_stop_the_start(files: Files) -> None:
    tls, other = files.node("a"), files.node("b")
    Path(tls.cert).write_bytes(Path(other.cert).read_bytes())
    with pytest.raises(ConfigError, match=r"the TLS files .* cannot be used together"):
        RequestPlaneServer(identity(tls), Listen(host=HOST))
