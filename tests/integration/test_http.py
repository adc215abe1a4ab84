"""The Frontend over real sockets: aiohttp where a client behaves, plain bytes where it does not."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
import uvloop

from stator.errors import ConfigError, Ending
from stator.frontend import server as server_module
from stator.frontend.server import FrontendServer
from stator.frontend.settings import ConnectionSettings, FrontendSettings
from stator.transport import Call
from unit.frontend.frontend_fakes import (
    MODEL,
    Fixture,
    chat_body,
    delta,
    events_of,
    frontend,
    say,
    say_hello,
    text_body,
)

CHAT = "/v1/chat/completions"
HOST = "127.0.0.1"


@asynccontextmanager
async def serving(
    script: Callable[[Call], None] = say_hello,
    settings: FrontendSettings | None = None,
    connection: ConnectionSettings | None = None,
) -> AsyncIterator[tuple[Fixture, FrontendServer, aiohttp.ClientSession]]:
    async with frontend(script, settings) as fe:
        server = FrontendServer(fe.app, host=HOST, port=0, settings=connection)
        await server.start()
        try:
            async with aiohttp.ClientSession(f"http://{HOST}:{server.port}") as client:
                yield fe, server, client
        finally:
            await server.stop()


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else None

    def runner(main: Callable[[], Awaitable[None]]) -> None:
        with asyncio.Runner(loop_factory=factory) as loop_runner:
            loop_runner.run(main())  # type: ignore[arg-type]

    return runner


Run = Callable[[Callable[[], Awaitable[None]]], None]


async def raw(server: FrontendServer, data: bytes) -> bytes:
    """Send bytes; everything that comes until the server closes."""
    reader, writer = await asyncio.open_connection(HOST, server.port)
    try:
        writer.write(data)
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


def post(body: bytes, path: str = CHAT, *headers: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(head).encode() + body


def test_a_stream_arrives_chunk_by_chunk(run: Run):
    async def main() -> None:
        async with serving(lambda call: call.items([delta("0")])) as (fe, _, client):
            async with client.post(CHAT, data=chat_body(stream=True)) as answer:
                assert answer.status == 200
                assert "date" in answer.headers
                call = await fe.arrivals.get()
                texts: list[str] = []
                for number in range(1, 5):
                    while not texts or texts[-1] != str(number - 1):
                        event = json.loads((await answer.content.readuntil(b"\n\n")).removeprefix(b"data: "))
                        texts.append(event["choices"][0]["delta"]["content"])
                    # Only now, having read the one before, does the next one come into being.
                    call.items([delta(str(number), Ending.STOP if number == 4 else None)])
                call.end()
                rest = events_of(await answer.read())
        assert texts == ["", "0", "1", "2", "3"]
        assert rest[0]["choices"][0]["delta"] == {"content": "4"}
        assert rest[-1] == "[DONE]"

    run(main)


def test_a_client_that_leaves_cancels_before_and_after_the_first_token(run: Run):
    async def main() -> None:
        async with serving(lambda call: None) as (fe, server, _):
            for first in (False, True):
                reader, writer = await asyncio.open_connection(HOST, server.port)
                writer.write(post(chat_body(stream=True)))
                call = await fe.arrivals.get()
                if first:
                    call.items([delta("a")])
                    await reader.readuntil(b"\n\n")
                writer.close()
                assert await fe.cancelled.get() is call
            await fe.app.generation.idle()

    run(main)


async def flood(call: Call, text: str) -> None:
    """Items without end, until the call is cancelled."""
    while not call.cancelled:
        call.items([delta(text)])
        await asyncio.sleep(0)


def test_a_client_that_leaves_with_a_second_request_queued_cancels(run: Run):
    async def main() -> None:
        async with serving(lambda call: None) as (fe, server, _):
            _, writer = await asyncio.open_connection(HOST, server.port)
            writer.write(post(chat_body(stream=True)) + post(chat_body()))
            call = await fe.arrivals.get()
            writer.transport.abort()
            # Reading is paused for the queued request, so that the loss shows when something is written.
            await flood(call, "a")
            await fe.app.generation.idle()
            assert len(fe.calls) == 1

    run(main)


def test_a_slow_reader_gets_everything_and_delays_nobody(run: Run):
    num, text = 200, "x" * 50_000

    async def feed(call: Call) -> None:
        for number in range(num):
            call.items([delta(f"{number} {text}", Ending.STOP if number == num - 1 else None)])
            await call.writable()
        call.end()

    async def main() -> None:
        feeders: list[asyncio.Task[None]] = []

        def script(call: Call) -> None:
            if call.request.stream:
                feeders.append(asyncio.get_running_loop().create_task(feed(call)))
            else:
                say("quick")(call)

        async with serving(script, FrontendSettings(max_buffered_deltas=4)) as (fe, server, client):
            reader, writer = await asyncio.open_connection(HOST, server.port, limit=64 * 1024)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
            writer.write(post(text_body(stream=True), "/v1/completions", "connection: close"))
            await fe.arrivals.get()
            for _ in range(3):
                async with client.post("/v1/completions", data=text_body()) as answer:
                    assert answer.status == 200
            assert not feeders[0].done()
            received = await reader.read()
            await feeders[0]
            writer.close()
        assert received.count(text.encode()) == num
        assert received.rstrip().endswith(b"0")
        assert b"[DONE]" in received[-100:]

    run(main)


def test_a_client_that_reads_nothing_is_dropped(run: Run):
    async def main() -> None:
        floods: list[asyncio.Task[None]] = []

        def script(call: Call) -> None:
            floods.append(asyncio.get_running_loop().create_task(flood(call, "x" * 100_000)))

        settings = FrontendSettings(max_buffered_deltas=2)
        async with serving(script, settings, ConnectionSettings(write_timeout_s=0.1)) as (fe, server, _):
            _, writer = await asyncio.open_connection(HOST, server.port)
            writer.transport.pause_reading()
            writer.write(post(text_body(stream=True), "/v1/completions"))
            await fe.cancelled.get()
            await fe.app.generation.idle()
            await asyncio.gather(*floods)
            writer.transport.abort()

    run(main)


def test_a_hundred_streams_at_once(run: Run):
    async def one(client: aiohttp.ClientSession, number: int) -> None:
        async with client.post(CHAT, data=chat_body(stream=True, seed=number)) as answer:
            *chunks, done = events_of(await answer.read())
        assert done == "[DONE]"
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == f"{number} " * 20

    def script(call: Call) -> None:
        texts = [delta(f"{call.request.seed} ") for _ in range(19)]
        step(call, [*texts, delta(f"{call.request.seed} ", Ending.LENGTH)])

    def step(call: Call, deltas: list[object]) -> None:
        call.items(deltas[:3])
        if deltas[3:]:
            asyncio.get_running_loop().call_soon(step, call, deltas[3:])
        else:
            call.end()

    async def main() -> None:
        async with serving(script) as (fe, server, _):
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(f"http://{HOST}:{server.port}", connector=connector) as client:
                await asyncio.gather(*(one(client, number) for number in range(100)))
            await fe.app.generation.idle()
            assert len(fe.calls) == 100

    run(main)


def test_a_connection_serves_many_requests(run: Run):
    async def main() -> None:
        async with serving() as (_, server, _client):
            requests = post(chat_body()) + post(b"{") + post(chat_body(stream=True))
            requests += b"GET /v1/models/" + MODEL.replace("/", "%2F").encode() + b" HTTP/1.1\r\nhost: x\r\n\r\n"
            requests += b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            answers = (await raw(server, requests)).split(b"HTTP/1.1 ")[1:]
            assert [answer[:3] for answer in answers] == [b"200", b"400", b"200", b"200", b"200"]

    run(main)


def test_garbage(run: Run):
    async def main() -> None:
        async with serving() as (_, server, client):
            for garbage in (
                b"\x16\x03\x01\x02\x00\x01",
                b"GET nonsense\r\n\r\n",
                b"\r\n\x00\r\n",
            ):
                answer = await raw(server, garbage)
                assert answer.startswith(b"HTTP/1.1 400 ")
                assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"
            async with client.get("/live") as alive:
                assert alive.status == 200

    run(main)


def test_garbage_behind_a_request_does_not_break_its_answer(run: Run):
    async def main() -> None:
        async with serving(lambda call: call.items([delta("a")])) as (fe, server, _):
            reader, writer = await asyncio.open_connection(HOST, server.port)
            writer.write(post(chat_body(stream=True)) + b"\x00\x01 nonsense\r\n\r\n")
            call = await fe.arrivals.get()
            received = await reader.readuntil(b'"content":"a"')
            call.items([delta("b", Ending.STOP)])
            call.end()
            received += await reader.read()
            writer.close()
        assert b'"content":"b"' in received
        assert b"[DONE]" in received
        assert received.count(b"HTTP/1.1") == 1

    run(main)


def test_heads_have_bounds(run: Run):
    async def main() -> None:
        connection = ConnectionSettings(head_timeout_s=0.1, max_head_bytes=1000)
        async with serving(connection=connection) as (_, server, _client):
            assert (await raw(server, b"GET / HTTP/1.1\r\nx: " + b"y" * 2000)).startswith(b"HTTP/1.1 431 ")
            assert (await raw(server, b"GET / HTTP/1.1\r\nx: y")).startswith(b"HTTP/1.1 408 ")
            assert await raw(server, b"") == b""
            assert (await raw(server, post(chat_body()) + b"GET /li")).startswith(b"HTTP/1.1 200 ")

    run(main)


def test_bodies_that_do_not_fit_their_head(run: Run):
    async def main() -> None:
        settings = FrontendSettings(max_body_bytes=1000, receive_timeout_s=0.1)
        async with serving(settings=settings) as (_, server, client):
            async with client.post(CHAT, data=b"x" * 3000) as answer:
                assert answer.status == 413
            waiting = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 3000\r\nexpect: 100-continue\r\n\r\n"
            assert (await raw(server, waiting.encode())).startswith(b"HTTP/1.1 413 ")
            chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
            assert (await raw(server, head + chunk * 3 + b"0\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
            assert (await raw(server, head + chunk * 9)).startswith(b"HTTP/1.1 413 ")
            short = post(b"{}").replace(b"length: 2", b"length: 9")
            assert (await raw(server, short)).startswith(b"HTTP/1.1 408 ")
            async with client.get("/live") as alive:
                assert alive.status == 200

    run(main)


def test_head_options_and_upgrade(run: Run):
    async def main() -> None:
        async with serving() as (_, _server, client):
            async with client.head("/v1/models") as answer:
                assert (answer.status, await answer.read()) == (200, b"")
                assert int(answer.headers["content-length"]) > 0
            async with client.options(CHAT) as answer:
                assert (answer.status, answer.headers["allow"]) == (405, "POST")
            upgrade = {"connection": "upgrade", "upgrade": "websocket"}
            async with client.get("/live", headers=upgrade) as answer:
                assert answer.status == 200

    run(main)


def test_expect_continue_is_answered(run: Run):
    async def main() -> None:
        async with serving() as (_, _server, client):
            async with client.post(CHAT, data=chat_body(), expect100=True) as answer:
                assert answer.status == 200

    run(main)


def test_drain_lets_streams_finish_and_refuses_new_requests(run: Run):
    async def main() -> None:
        async with serving(lambda call: call.items([delta("a")])) as (fe, server, client):
            async with client.post(CHAT, data=chat_body(stream=True)) as answer:
                call = await fe.arrivals.get()
                draining = asyncio.get_running_loop().create_task(server.drain(10))
                async with client.get("/health") as health:
                    assert health.status == 503
                async with client.post(CHAT, data=chat_body()) as refused:
                    assert refused.status == 503
                    assert refused.headers["retry-after"] == "1"
                call.items([delta("b", Ending.STOP)])
                call.end()
                assert await draining
                assert events_of(await answer.read())[-1] == "[DONE]"
            await server.stop()
            with pytest.raises(aiohttp.ClientConnectionError):
                await client.get("/live")

    run(main)


def test_stop_tells_streams_that_did_not_finish(run: Run):
    async def main() -> None:
        async with serving(lambda call: call.items([delta("a")])) as (fe, server, client):
            async with client.post(CHAT, data=chat_body(stream=True)) as answer:
                await fe.arrivals.get()
                assert not await server.drain(0.01)
                await server.stop()
                assert events_of(await answer.read())[-1]["error"]["code"] == "draining"
                await fe.cancelled.get()

    run(main)


def test_stop_does_not_wait_for_idle_connections_or_half_sent_bodies(run: Run):
    async def main() -> None:
        async with serving() as (_, server, _client):
            connections = [await asyncio.open_connection(HOST, server.port) for _ in range(3)]
            connections[1][1].write(post(chat_body())[:-5])
            connections[2][1].write(b"GET /li")
            await connections[2][1].drain()
            async with asyncio.timeout(10):
                await server.stop()
                for reader, writer in connections:
                    try:
                        await reader.read()
                    except ConnectionError:
                        pass
                    writer.close()

    run(main)


async def answer_of(reader: asyncio.StreamReader) -> tuple[dict[bytes, bytes], bytes]:
    """Headers and body of one answer on a connection that stays open."""
    head = await reader.readuntil(b"\r\n\r\n")
    headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    return headers, await reader.readexactly(int(headers[b"content-length"]))


def test_a_server_that_hands_over_is_polite_to_its_connections(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Idle, answering, about to send: each is served to the end, and told; nobody is refused or reset."""
    monkeypatch.setattr(server_module, "LINGER_S", 0.3)

    async def main() -> None:
        async with serving(lambda call: call.items([delta("a")])) as (fe, server, _):
            idle, used, streaming = [await asyncio.open_connection(HOST, server.port) for _ in range(3)]
            for reader, writer in (idle, used):
                writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
                assert b"connection" not in (await answer_of(reader))[0]
            streaming[1].write(post(chat_body(stream=True)))
            call = await fe.arrivals.get()
            await streaming[0].readuntil(b'"a"')

            handing_over = asyncio.ensure_future(server.hand_over())
            await asyncio.sleep(0)
            with pytest.raises(OSError):
                await asyncio.open_connection(HOST, server.port)
            # A request that comes on a connection that was idle, as if it had been on its way: taken, then closed.
            used[1].write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n")
            headers, body = await answer_of(used[0])
            assert (headers[b"connection"], body) == (b"close", b'{"status":"live"}')
            assert await used[0].read() == b""
            assert await idle[0].read() == b"", "closed after it was idle for a while"
            assert not handing_over.done()
            # A stream that began before ends whole; its connection takes one more request.
            call.items([delta("b", Ending.STOP)])
            call.end()
            assert b"[DONE]" in await streaming[0].readuntil(b"\r\n0\r\n\r\n")
            fe.script = say_hello
            streaming[1].write(post(chat_body()))
            headers, body = await answer_of(streaming[0])
            assert headers[b"connection"] == b"close" and b"Hello world" in body
            await asyncio.wait_for(handing_over, 5)
            for _, writer in (idle, used, streaming):
                writer.close()

    run(main)


def test_another_process_accepts_from_the_socket_that_was_handed_over(run: Run):
    async def main() -> None:
        async with frontend() as fe:
            listener = socket.create_server((HOST, 0))
            first, second = (FrontendServer(fe.app, fd=listener.dup().detach()) for _ in range(2))
            await first.start()
            async with asyncio.timeout(5):
                await first.hand_over()
                # Nobody accepts; the connection waits.
                waiting = asyncio.ensure_future(raw(first, b"GET /live HTTP/1.1\r\nconnection: close\r\n\r\n"))
                await first.stop()
                await second.start()
                assert (await waiting).startswith(b"HTTP/1.1 200")
            await second.stop()
            listener.close()

    run(main)


def test_a_port_in_use_is_named(run: Run):
    async def main() -> None:
        async with serving() as (fe, server, _):
            second = FrontendServer(fe.app, host=HOST, port=server.port)
            with pytest.raises(ConfigError, match=rf"port {server.port} is in use .* --Frontend\.port"):
                await second.start()
            await second.stop()
            with pytest.raises(ConfigError, match=r"--Frontend\.host"):
                await FrontendServer(fe.app, host="203.0.113.7", port=0).start()

    run(main)


def test_an_inherited_socket(run: Run):
    async def main() -> None:
        async with frontend() as fe:
            listener = socket.create_server((HOST, 0))
            server = FrontendServer(fe.app, fd=listener.detach())
            await server.start()
            async with aiohttp.ClientSession(f"http://{HOST}:{server.port}") as client:
                async with client.get("/metrics") as answer:
                    assert answer.content_type == "text/plain"
                    assert "stator_requests_in_progress" in await answer.text()
            await server.stop()

    run(main)
