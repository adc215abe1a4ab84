"""Engines whose KV blocks do not fit each other: never used together, and everybody is told."""

import asyncio
import json
import logging
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from deployment import Deployment, Node, deployed, run

from stator.engines.local.transfer import CONNECTOR
from stator.engines.transfer.messages import digest_tokens
from stator.frontend.app import FrontendApp
from stator.frontend.health import health_of
from stator.ids import InstanceId, JobId, RequestId, TransferId
from stator.messages.engine import EngineInfo, PrefillDone, PrefillDoneReply, PrefillJob, PrefillResult
from stator.messages.instances import InstanceInfo
from stator.messages.reports import WorkerReport
from stator.messages.tokens import num_tokens
from stator.observability.metrics import Metrics
from stator.observability.monitor import WorkerMonitor
from stator.queue.base import Delivery
from stator.runtime.context import CallContext
from stator.transport import Target, call

LONG = list(range(10, 60))
WORKER_LOG = "stator.worker.decode"


class Head:
    """What the head shows: the frontend's answers, and the figures that workers report to it."""

    def __init__(self, d: Deployment) -> None:
        self.metrics = Metrics()
        self._reported = asyncio.Event()
        self._latest: dict[InstanceId, WorkerReport] = {}
        self.monitor = WorkerMonitor(client=d.client, directory=d.directory, sink=self, rng=Random(1))
        self._app = FrontendApp(
            client=d.client,
            targets=lambda _: [],
            models=list,
            health=lambda: health_of(d.directory.instances()),
            metrics=self.metrics,
            rng=Random(1),
        )

    def update(self, instance: InstanceInfo, report: WorkerReport) -> None:
        self.metrics.workers.update(instance, report)
        self._latest[instance.instance_id] = report
        self._reported.set()

    def remove(self, instance_id: InstanceId) -> None:
        self.metrics.workers.remove(instance_id)

    async def shows(self, node: Node, predicate: Callable[[WorkerReport], bool]) -> None:
        async with asyncio.timeout(10):
            while node.instance_id not in self._latest or not predicate(self._latest[node.instance_id]):
                self._reported.clear()
                await self._reported.wait()

    async def get(self, path: str) -> tuple[int, str]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app({"type": "http", "method": "GET", "path": path, "headers": []}, receive, send)
        return sent[0]["status"], b"".join(message["body"] for message in sent[1:]).decode()


def prefill_instances(node: Node, pairing: str, count: int) -> str:
    labels = f'host="h",pairing="{pairing}",role="decode",service="decode",worker="{node.instance_id}"'
    return f"stator_worker_prefill_instances{{{labels}}} {float(count)}"


def unordered(line: str) -> tuple[str, frozenset[str], str]:
    """A line of the exposition, without the order of its labels."""
    name, _, rest = line.partition("{")
    labels, _, value = rest.partition("}")
    return name, frozenset(labels.split(",")), value


def test_engines_that_do_not_pair_are_never_used_together_and_it_shows(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            other = await d.add_prefill(block_size=8)
            head = Head(d)
            try:
                result = await d.generate(decode, LONG).wait()
                assert result.error is None
                assert result.token_ids == await d.text(LONG)
                assert decode.worker.report().prefills == {"local": 1, "remote": 0, "fallback": 0}
                assert decode.engine.load().prompt_tokens_transferred_total == 0
                assert other.engine.load().prompt_tokens_total == 0

                status, health = await head.get("/health")
                body = json.loads(health)
                assert (status, body["status"], body["reasons"]) == (200, "ready", [])
                plain = d.nodes[-1].instance_id
                assert body["pairing_refusals"] == [
                    {
                        "decode": [decode.instance_id, plain],
                        "prefill": [other.instance_id],
                        "differences": ["block_size is 4 for decode and 8 for prefill"],
                    }
                ]
                await head.shows(decode, lambda report: report.prefill_instances == {"paired": 0, "refused": 1})
                shown = {unordered(line) for line in (await head.get("/metrics"))[1].splitlines()}
                assert unordered(prefill_instances(decode, "refused", 1)) in shown
                assert unordered(prefill_instances(decode, "paired", 0)) in shown

                await d.add_prefill()
                await head.shows(decode, lambda report: report.prefill_instances == {"paired": 1, "refused": 1})
            finally:
                head.monitor.close()

    with caplog.at_level(logging.WARNING, logger=WORKER_LOG):
        run(scene)
    warned = [record.getMessage() for record in caplog.records if "cannot prefill" in record.getMessage()]
    assert warned == ["prefill instance prefill-1 cannot prefill for this worker: block_size is 4 here and 8 there"], (
        "once, however often the directory changed"
    )


def test_a_refused_instance_that_leaves_or_changes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            fits, wrong = decode.info, with_block_size(decode.info, 8)
            lease = await d.announce("p", wrong)
            await d.announce("q", wrong)
            assert decode.worker.report().prefill_instances == {"paired": 0, "refused": 2}
            await lease.revoke()
            await d.directory.wait_for(lambda directory: directory.get(InstanceId("p")) is None, 5)
            await d.announce("q", fits)
            assert decode.worker.report().prefill_instances == {"paired": 1, "refused": 0}

    with caplog.at_level(logging.INFO, logger=WORKER_LOG):
        run(scene)
    words = "cannot prefill for this worker: block_size is 4 here and 8 there"
    assert [record.getMessage() for record in caplog.records if record.name == WORKER_LOG] == [
        f"prefill instance p {words}",
        f"prefill instance q {words}",
        "prefill instance p, which could not prefill for this worker, has left",
        "prefill instance q can prefill for this worker now",
    ]


def test_a_job_that_reaches_an_instance_of_another_pairing_is_refused_and_counted() -> None:
    """A job is for whoever is first at the queue, so this happens whenever only some prefill instances fit."""

    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            await d.announce("fits", decode.info)
            other = await d.add_prefill(block_size=8)
            prompts = [[n, *LONG] for n in range(1, 5)]
            results = [d.generate(decode, prompt) for prompt in prompts]
            for prompt, result in zip(prompts, results, strict=True):
                assert (await result.wait()).error is None
                assert result.token_ids == await d.text(prompt)
            await d.reported(other, lambda report: report.prefills["refused"] == 4)
            assert other.worker.report().prefills == {"done": 0, "failed": 0, "refused": 4, "unwanted": 0}
            assert decode.worker.report().prefills == {"local": 0, "remote": 0, "fallback": 4}
            load = other.engine.load()
            assert (load.prompt_tokens_total, load.num_blocks_used) == (0, 0), "nothing was computed"
            await d.queue_size(lambda size: size.waiting + size.in_flight == 0)

    run(scene)


def with_block_size(info: EngineInfo, block_size: int) -> EngineInfo:
    return msgspec.structs.replace(info, pairing={**info.pairing, "block_size": str(block_size)})


async def take_job(d: Deployment) -> tuple[Delivery, PrefillJob]:
    lease = await d.discovery.grant_lease()
    (delivery,) = await d.queue.pull(InstanceId("test"), lease.lease_id, max_jobs=1, wait_s=5)
    return delivery, msgspec.msgpack.decode(delivery.payload, type=PrefillJob)


def completion(job: PrefillJob, instance: str, address: str) -> PrefillDone:
    """Of blocks that wait at address, if one believes it."""
    count = num_tokens(job.request.prompt_ids)
    transfer = {
        "connector": CONNECTOR,
        "transfer_id": TransferId("t"),
        "instance_id": instance,
        "addresses": [address],
        "num_tokens": count,
        "num_cached_tokens": 0,
        "digest": digest_tokens(job.request, count),
    }
    return PrefillDone(JobId(job.job_id), 1, InstanceId(instance), PrefillResult(transfer, count))


async def tell(d: Deployment, decode: Node, done: PrefillDone) -> bool:
    target = Target(decode.server.addresses, "prefill_done", decode.instance_id)
    context = CallContext(RequestId("done"))
    reply: PrefillDoneReply = await call(d.client, target, done, context=context, item_type=PrefillDoneReply)
    return reply.accepted


def test_blocks_that_an_instance_of_another_pairing_computed_all_the_same_are_not_taken() -> None:
    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            await d.announce("fits", decode.info)
            await d.announce("wrong", with_block_size(decode.info, 8))
            result = d.generate(decode, LONG)
            _, job = await take_job(d)
            assert not await tell(d, decode, completion(job, "wrong", "tcp://127.0.0.1:1")), "it frees its blocks"
            assert (await result.wait()).error is None
            assert result.token_ids == await d.text(LONG)
            assert decode.worker.report().prefills == {"local": 0, "remote": 0, "fallback": 1}

    run(scene)


@pytest.mark.parametrize("alive", [True, False])
def test_a_completion_of_an_instance_that_left_counts_if_its_blocks_can_be_fetched(alive: bool) -> None:
    """Discovery may be behind, or the instance may only be draining: the engine's own attempt decides."""

    async def scene() -> None:
        async with deployed() as d:
            decode = await d.add_decode()
            await d.announce("stays", decode.info)
            lease = await d.announce("leaves", decode.info)
            result = d.generate(decode, LONG)
            _, job = await take_job(d)
            await lease.revoke()
            await d.directory.wait_for(lambda directory: directory.get(InstanceId("leaves")) is None, 5)
            holder = await d.add_prefill()
            done = completion(job, "leaves", "tcp://127.0.0.1:1")
            if alive:
                held = await d.hold(holder, job.request)
                done = msgspec.structs.replace(done, result=held)
            assert await tell(d, decode, done)
            assert (await result.wait()).error is None
            assert result.token_ids == await d.text(LONG)
            fetched = decode.engine.load().prompt_tokens_transferred_total
            assert (fetched > 0) is alive
            await d.blocks_settle(decode)
            await d.blocks_settle(holder)

    run(scene)
