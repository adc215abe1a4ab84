"""Clients that leave or read slowly, draining, and what is counted."""

import asyncio
import logging
from dataclasses import replace

import pytest
from frontend_fakes import AsgiClient, ask, chat_body, delta, frontend, text_body
from prometheus_client.parser import text_string_to_metric_families

from stator.errors import Ending, ErrorCode, StatorError
from stator.frontend.settings import FrontendSettings
from stator.frontend.stream import DeltaStream
from stator.ids import InstanceId
from stator.messages.processor import CompletionDelta
from stator.observability.metrics import Metrics
from stator.transport import Call, Target

PATH = "/v1/chat/completions"
LABELS = ("model", "endpoint", "code")


def series(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels[label] for label in LABELS if label in sample.labels): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_cancels(stream: bool):
    async def run() -> None:
        async with frontend(lambda call: None) as fe:
            client = AsgiClient(fe.app)
            task = asyncio.ensure_future(client.request("POST", PATH, chat_body(stream=stream)))
            call = await fe.arrivals.get()
            client.leave()
            assert await fe.cancelled.get() is call
            await task
            assert fe.app.generation.num_open == 0
            assert series(fe.metrics, "stator_client_disconnects_total") == {("chat",): 1}
            assert series(fe.metrics, "stator_requests_total") == {("org/tiny", "chat", "499"): 1}

    asyncio.run(run())


def test_a_client_that_leaves_in_mid_stream_cancels():
    async def run() -> None:
        async with frontend(lambda call: call.items([delta("a")])) as fe:
            client = AsgiClient(fe.app)
            task = asyncio.ensure_future(client.request("POST", PATH, chat_body(stream=True)))
            call = await fe.arrivals.get()
            await client.sent.wait()
            client.leave()
            assert await fe.cancelled.get() is call
            await task

    asyncio.run(run())


def test_a_client_that_leaves_while_it_sends_is_no_call():
    async def run() -> None:
        async with frontend() as fe:
            client = AsgiClient(fe.app)
            client.leave()
            answer = await client.request("POST", PATH, b'{"mod', whole=False)
            assert not answer.status
            assert not fe.calls

    asyncio.run(run())


def test_a_cancelled_server_task_cancels_the_call():
    async def run() -> None:
        async with frontend(lambda call: None) as fe:
            task = asyncio.ensure_future(ask(fe.app, "POST", PATH, chat_body()))
            await fe.arrivals.get()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await fe.cancelled.get()
            assert fe.app.generation.num_open == 0

    asyncio.run(run())


def test_a_client_that_reads_slowly_pauses_the_processor_and_loses_nothing():
    num = 2000

    async def run() -> None:
        async with frontend(lambda call: call.items([delta("0;")]), FrontendSettings(max_buffered_deltas=8)) as fe:
            client = AsgiClient(fe.app)
            task = asyncio.ensure_future(client.request("POST", "/v1/completions", text_body(stream=True)))
            call = await fe.arrivals.get()
            await client.sent.wait()
            client.gate.clear()
            for number in range(1, num):
                call.items([delta(f"{number};")])
            await client.blocked.wait()
            # The sender still holds most of it: what passed the window and the buffer is not ours to keep.
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await call.writable()
            client.gate.set()
            await call.writable()
            call.items([delta("", Ending.STOP)])
            call.end()
            answer = await task
        texts = [event["choices"][0]["text"] for event in answer.events[:-1]]
        assert "".join(texts) == "".join(f"{number};" for number in range(num))

    asyncio.run(run())


class PausedHandle:
    def __init__(self) -> None:
        self.log: list[str] = []

    def cancel(self) -> None:
        self.log.append("cancel")

    def pause(self) -> None:
        self.log.append("pause")

    def resume(self) -> None:
        self.log.append("resume")


def test_buffer_pauses_once_and_resumes_when_empty():
    async def run() -> None:
        handle = PausedHandle()
        stream = DeltaStream(
            2, Metrics().histogram("inter_token_latency_seconds", "m", "chat"), asyncio.get_running_loop()
        )
        stream.attach(handle)
        for _ in range(4):
            stream.items([CompletionDelta("a")])
        assert handle.log == ["pause"]
        assert len(await stream.batch()) == 4
        assert handle.log == ["pause"]
        waiting = asyncio.ensure_future(stream.batch())
        await asyncio.sleep(0)
        assert handle.log == ["pause", "resume"]
        stream.items([CompletionDelta("b")])
        assert await waiting == [CompletionDelta("b")]
        stream.end()
        stream.close()
        assert await stream.batch() == []
        assert handle.log == ["pause", "resume"]

    asyncio.run(run())


def test_draining():
    async def run() -> None:
        async with frontend(lambda call: call.items([delta("a")])) as fe:
            client = AsgiClient(fe.app)
            task = asyncio.ensure_future(client.request("POST", PATH, chat_body(stream=True)))
            call = await fe.arrivals.get()
            await client.sent.wait()
            fe.app.generation.drain()
            refused = await ask(fe.app, "POST", PATH, chat_body())
            assert refused.status == 503
            assert refused.error["code"] == "draining"
            assert refused.headers["retry-after"] == "1"
            health = await ask(fe.app, "GET", "/health")
            assert (health.status, health.json["status"]) == (503, "draining")
            call.items([delta("b", Ending.STOP)])
            call.end()
            await fe.app.generation.idle()
            assert (await task).events[-1] == "[DONE]"

    asyncio.run(run())


def test_abort_tells_clients_and_cancels_calls():
    async def run() -> None:
        async with frontend(lambda call: call.items([delta("a")])) as fe:
            client = AsgiClient(fe.app)
            task = asyncio.ensure_future(client.request("POST", PATH, chat_body(stream=True)))
            await fe.arrivals.get()
            await client.sent.wait()
            fe.app.generation.abort()
            answer = await task
            await fe.cancelled.get()
        assert answer.events[-1]["error"]["code"] == "draining"

    asyncio.run(run())


def test_what_is_counted(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "stator.frontend.access")

    async def run() -> None:
        async with frontend() as fe:
            await ask(fe.app, "POST", PATH, chat_body(stream=True))
            await ask(fe.app, "POST", PATH, chat_body(model="made-up-1"))
            await ask(fe.app, "POST", PATH, b"{")
            metrics = fe.metrics
        chat = ("org/tiny", "chat")
        assert series(metrics, "stator_requests_total") == {
            (*chat, "200"): 1,
            ("other", "chat", "200"): 1,
            ("other", "chat", "400"): 1,
        }
        assert series(metrics, "stator_request_input_tokens_sum")[chat] == 7
        assert series(metrics, "stator_request_output_tokens_sum")[chat] == 3
        assert series(metrics, "stator_request_cached_tokens_sum")[chat] == 4
        assert series(metrics, "stator_time_to_first_token_seconds_count")[chat] == 1
        assert series(metrics, "stator_requests_in_progress") == {("chat",): 0}

    asyncio.run(run())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("chat ")
    assert "200 stop model=org/tiny stream=1 in=7 out=2 cached=4 ttft_ms=" in lines[0]
    assert "model=other" in lines[1]
    assert "made-up" not in lines[1]
    assert "400 invalid_request" in lines[2]


def test_token_latency_is_of_the_time_between_arrivals():
    def script(call: Call) -> None:
        call.items([delta("a")])
        asyncio.get_running_loop().call_later(0.03, finish, call)

    def finish(call: Call) -> None:
        call.items([delta("b", Ending.STOP)])
        call.end()

    async def run() -> None:
        async with frontend(script) as fe:
            await ask(fe.app, "POST", PATH, chat_body(stream=True))
            name = "stator_inter_token_latency_seconds"
            assert series(fe.metrics, f"{name}_count") == {("org/tiny", "chat"): 1}
            assert series(fe.metrics, f"{name}_sum")["org/tiny", "chat"] >= 0.029

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_a_processor_that_left_costs_no_request_that_it_had_not_begun(stream: bool):
    async def main() -> None:
        async with frontend() as fe:
            known = fe.app.generation._targets  # pyright: ignore[reportPrivateUsage]

            def with_one_that_left(endpoint: str) -> list[Target]:
                # The server refuses calls that mean another instance.
                return [*known(endpoint), replace(known(endpoint)[0], instance_id=InstanceId("left"))]

            fe.app.generation._targets = with_one_that_left  # pyright: ignore[reportPrivateUsage]
            for _ in range(4):
                assert (await ask(fe.app, "POST", PATH, chat_body(stream=stream))).status == 200
            assert len(fe.calls) == 4

    asyncio.run(main())


def test_a_processor_that_left_after_it_had_begun_ends_the_request():
    def lost(call: Call) -> None:
        call.items([delta("a")])
        call.end(StatorError(ErrorCode.INSTANCE_LOST, "the processor was lost"))

    async def main() -> None:
        async with frontend(lost) as fe:
            known = fe.app.generation._targets  # pyright: ignore[reportPrivateUsage]
            fe.app.generation._targets = lambda endpoint: [  # pyright: ignore[reportPrivateUsage]
                *known(endpoint),
                replace(known(endpoint)[0], instance_id=InstanceId("left")),
            ]
            answers = [await ask(fe.app, "POST", PATH, chat_body(stream=True)) for _ in range(2)]
            for answer in answers:
                assert answer.events[-1]["error"]["code"] == "instance_lost"
            assert len(fe.calls) == 2

    asyncio.run(main())
