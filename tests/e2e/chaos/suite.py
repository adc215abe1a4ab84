"""The 24 scenes, and how they are played: on each plane two deployments, whose scenes run beside each other."""

import asyncio
import contextlib
import os
import shutil
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from hosts import Hosts, on_host

from chaos import scenes_load as load
from chaos import scenes_machine as machine
from chaos import scenes_planes as control
from chaos import scenes_workers as workers
from chaos.deployment import CLIENT, Deployment, Lane
from chaos.rows import Row, Scene

MINUTES = float(os.environ.get("MINUTES") or 1)
"""How long scene 24 lasts."""

TEXT = Lane("text", num_etcd=3)
"""The bundled model on CPUs: the text of an answer depends on the attention state that is moved and recomputed."""

SIM = Lane(
    "sim",
    num_etcd=1,
    flags=(
        *(f"--{s}.{flag}" for s in ("VllmWorker", "PrefillWorker") for flag in ("engine=sim", "sim-speed=0.1")),
        *("--VllmWorker.max-num-seqs=8", "--Router.max-queue-wait=20", "--Router.max-queued-requests=32"),
    ),
)
"""Engines that only take time, a tenth of the bundled model's speed: for what lasts, and for load. A token is a hash of
all before it as they are found in the blocks, so that text is as telling."""

LANES = (TEXT, SIM)
EMBEDDED, EXTERNAL = ("embedded",), ("external",)

SCENES: tuple[Scene, ...] = (
    Scene(
        "1",
        "decode worker killed in mid-stream",
        "its streams go on elsewhere, same text",
        "log: `goes on elsewhere after N tokens`",
        workers.decode_killed,
    ),
    Scene(
        "1b",
        "decode worker killed while its prompts are prefilled elsewhere",
        "its requests begin again elsewhere; what was prefilled for it is released",
        "log: `goes on elsewhere`",
        workers.decode_killed_in_remote_prefill,
    ),
    Scene(
        "2",
        "decode worker killed in mid-stream, `migration-limit: 0`",
        "its streams end with one error; no prompt is computed again",
        "`stator_requests_total{code}`",
        workers.decode_killed_without_migration,
        may_refuse=True,
    ),
    Scene(
        "3",
        "decode worker told to stop (SIGTERM)",
        "it finishes what it has, or others go on with it",
        "`stator status`: draining",
        workers.decode_stopped,
    ),
    Scene(
        "3b",
        "prefill worker told to stop (SIGTERM)",
        "it finishes its jobs and keeps their blocks until they are fetched",
        "`stator status`: draining",
        workers.prefill_stopped,
    ),
    Scene(
        "4",
        "prefill worker killed during its jobs",
        "the jobs go to another prefill worker, or are prefilled by the decode worker",
        "`stator_remote_prefill_total`",
        workers.prefill_killed_in_job,
    ),
    Scene(
        "4b",
        "prefill worker killed after its job, before a block was fetched",
        "the decode worker computes what it did not get",
        "log: `no KV blocks from the prefill engine`",
        workers.prefill_killed_after_job,
    ),
    Scene(
        "4c",
        "prefill worker killed while its blocks are fetched",
        "the decode worker computes what it did not get",
        "log: `no KV blocks from the prefill engine`",
        workers.prefill_killed_in_transfer,
    ),
    Scene(
        "5",
        "all prefill nodes lose their power",
        "decode workers prefill for themselves",
        '`stator_remote_prefill_total{outcome="fallback"}`',
        workers.all_prefill_gone,
    ),
    Scene(
        "6",
        "all workers killed in mid-stream",
        "streams wait for a worker and go on; new requests get 503 with Retry-After",
        "`/health`",
        workers.all_workers_gone,
    ),
    Scene(
        "8",
        "engine crashes in mid-stream, its worker lives",
        "its streams go on elsewhere, the worker is started again",
        "log: `goes on elsewhere after N tokens`",
        workers.engine_crashes,
    ),
    Scene(
        "8b",
        "engine hangs in mid-stream",
        "its worker leaves after `progress-timeout`, its streams go on elsewhere",
        "log: `hung`; `stator_worker_stalls_total`",
        workers.engine_hangs,
    ),
    Scene(
        "9",
        "Frontend killed",
        "nobody computes for its clients any more; it is started again",
        "`stator_worker_running_requests`",
        control.frontend_killed,
    ),
    Scene(
        "10",
        "client leaves while decoding",
        "work stops, blocks are free within a second",
        "`stator_client_disconnects_total`",
        load.leaves_while_decoding,
    ),
    Scene(
        "10b",
        "client leaves while its prompt waits or is prefilled",
        "job and prefill are cancelled, blocks are free within a second",
        "`stator_client_disconnects_total`",
        load.leaves_while_prefilled,
    ),
    Scene(
        "10c",
        "client leaves while its KV blocks are fetched",
        "the transfer ends, blocks are free on both sides",
        "`stator_worker_kv_blocks_held`",
        load.leaves_in_transfer,
    ),
    Scene(
        "11",
        "store and bus killed for 12 s, then back with what they had (the hub: empty)",
        "serving goes on; instances register again under their ids; no queue: prefilled by the decode worker",
        "log: `goes on with what it knows`; `stator status`",
        control.store_and_bus_killed,
    ),
    Scene(
        "11b",
        "store wiped",
        "noticed and repaired within seconds, under the same ids",
        "`etcdctl get --prefix`",
        control.store_wiped,
        planes=EXTERNAL,
    ),
    Scene(
        "11c",
        "bus killed for 3 s",
        "decode workers prefill for themselves; jobs again when it is back",
        '`stator_remote_prefill_total{outcome="fallback"}`',
        control.bus_killed,
        planes=EXTERNAL,
    ),
    Scene(
        "11d",
        "bus wiped",
        "the queue is made again",
        "log: `queue`",
        control.bus_wiped,
        planes=EXTERNAL,
    ),
    Scene(
        "11e",
        "store and bus wiped (the hub: started again at once)",
        "as each of them",
        "`stator status`",
        control.store_and_bus_wiped,
    ),
    Scene(
        "11f",
        "store and bus slow for 14 s: still for 1.5 s of every 2",
        "serving goes on; no lease is lost",
        "log: `could not renew`",
        control.store_and_bus_slow,
    ),
    Scene(
        "11g",
        "the hub stands still for 14 s (SIGSTOP)",
        "serving goes on; no lease is lost",
        "log of the hub: `stood still for`",
        control.hub_stands_still,
        planes=EMBEDDED,
    ),
    Scene(
        "12",
        "each of three etcd members killed in turn",
        "nobody notices",
        "`etcdctl endpoint status`",
        control.members_in_turn,
        planes=EXTERNAL,
    ),
    Scene(
        "14",
        "router killed under load",
        "streams go on, new requests wait for the next router; index and hit rate come back",
        "`stator_router_bookings`, `stator_router_index_blocks`",
        control.router_killed,
    ),
    Scene(
        "16",
        "prefill nodes cut off for 12 s, and heal",
        "decode workers prefill for themselves; no answer comes twice; they take jobs again",
        "`stator status`; `stator_remote_prefill_total`",
        workers.partition,
    ),
    Scene(
        "20",
        "a prompt crashes every engine",
        "it is refused after its second victim; the others' streams go on",
        "log of the Processor: both victims",
        workers.poison,
    ),
    Scene(
        "21",
        "decode workers restarted one after another (`stator drain VllmWorker --all --restart`)",
        "no request fails",
        "`stator status`",
        workers.decode_rolled,
    ),
    Scene(
        "23",
        "a node's disk is full",
        "it serves on without its log, which goes on when there is room",
        "the log itself",
        machine.disk_full,
    ),
    Scene(
        "23b",
        "nobody reads a head's output",
        "it serves on; what does not fit its queue is dropped and counted",
        "log: `lines were dropped`",
        machine.output_unread,
    ),
    Scene(
        "23c",
        "a head's supervisor stands still (SIGSTOP)",
        "its processes serve on",
        "-",
        machine.supervisor_frozen,
    ),
    Scene(
        "23d",
        "a node's clock jumps an hour forward and back",
        "nothing but the times in its log",
        "the log itself",
        machine.clock_jumps,
    ),
    Scene(
        "7",
        "decode worker frozen (SIGSTOP) for 30 s in mid-stream",
        "out when its lease ends, its streams go on elsewhere; comes back under a new id, without stale state",
        "`stator status`",
        workers.decode_frozen,
        lane="sim",
        beside=True,
    ),
    Scene(
        "13",
        "prefill node paused for longer than a lease, with jobs in hand",
        "its jobs go to another when the lease ends; it comes back under a new id",
        "log: `stood still for`",
        workers.node_frozen,
        lane="sim",
    ),
    Scene(
        "13b",
        "prefill worker frozen (SIGSTOP) while its blocks are fetched",
        "as if it were killed, after the transfer's time-out or its lease",
        "log: `no KV blocks from the prefill engine`",
        workers.prefill_frozen_in_transfer,
        lane="sim",
    ),
    Scene(
        "10d",
        "client leaves while its request waits for a worker with room",
        "it leaves the line at once",
        "`stator_router_waiting_requests`",
        load.leaves_the_line,
        lane="sim",
    ),
    Scene(
        "15",
        "KV events are dropped",
        "the router takes a new snapshot; meanwhile only the hit rate dips",
        "`stator_router_index_gaps_total`",
        control.events_garbled("drop"),
        lane="sim",
    ),
    Scene(
        "15b",
        "KV events come twice",
        "nothing",
        "`stator_router_index_gaps_total`",
        control.events_garbled("double"),
        lane="sim",
    ),
    Scene(
        "15c",
        "KV events come in another order",
        "the router takes a new snapshot; meanwhile only the hit rate dips",
        "`stator_router_index_gaps_total`",
        control.events_garbled("reorder"),
        lane="sim",
    ),
    Scene(
        "17",
        "slow reader",
        "it gets its answer at its own speed; nobody else waits for it",
        "-",
        load.slow_reader,
        lane="sim",
    ),
    Scene(
        "17b",
        "worker behind a slow link that is reset, and loses what is sent",
        "streams go on, elsewhere after the reset",
        "log: `goes on elsewhere`",
        load.slow_link,
        lane="sim",
    ),
    Scene(
        "22",
        "decode worker joins under load",
        "it gets requests once it is ready",
        "`/health`",
        workers.worker_joins,
        lane="sim",
    ),
    Scene(
        "18",
        "three times overload",
        "what is accepted is served; the rest gets 429 with Retry-After at once or after `max-queue-wait`",
        "`stator_router_refusals_total`",
        load.overload,
        lane="sim",
        may_refuse=True,
    ),
    Scene(
        "19",
        "one decode worker ten times slower",
        "it gets few requests, and finishes them",
        "log of the Router names it",
        load.slow_worker,
        lane="sim",
    ),
    Scene(
        "24",
        "random kills every 5 s",
        "counters add up, nothing leaks",
        "`stator_requests_total`",
        load.random_kills(60 * MINUTES),
        lane="sim",
        may_refuse=True,
    ),
)

Outcome = Row | BaseException
Tell = Callable[[Scene, Outcome], Awaitable[None]]


def chosen(words: Sequence[str], plane: str) -> list[Scene]:
    """Scenes whose number is one of words, or whose name has one of them."""

    def matches(scene: Scene) -> bool:
        return any(word in (scene.number, scene.whole) or (not word.isdigit() and word in scene.name) for word in words)

    return [scene for scene in SCENES if plane in scene.planes and (not words or matches(scene))]


async def play(plane: str, scenes: Sequence[Scene], network: Hosts, state_dir: Path, tell: Tell) -> None:
    """Each scene of both lanes; tell is called with what came of it."""
    async with asyncio.TaskGroup() as group:
        for lane in LANES:
            of_lane = [scene for scene in scenes if scene.lane == lane.name]
            if of_lane:
                group.create_task(_play_lane(plane, lane, of_lane, network, state_dir / lane.name, tell))


def host_names() -> list[str]:
    return [CLIENT, *(name for lane in LANES for name in lane.host_names)]


async def _play_lane(
    plane: str, lane: Lane, scenes: Sequence[Scene], network: Hosts, state_dir: Path, tell: Tell
) -> None:
    """One deployment for all, as long as scenes leave it whole; after one that fails, a new one."""
    deployment: Deployment | None = None
    number = 0
    todo = list(scenes)
    try:
        while todo:
            together = [todo.pop(0)]
            while together[-1].beside and todo:
                together.append(todo.pop(0))
            if deployment is None:
                number += 1
                deployment = Deployment(plane, lane, network, state_dir / str(number))
                await deployment.start()
            outcomes = await asyncio.gather(*(_played(scene, deployment) for scene in together))
            if any(isinstance(outcome, BaseException) for outcome in outcomes):
                broken, deployment = deployment, None
                outcomes = [_with_logs(outcome, broken) for outcome in outcomes]
                with contextlib.suppress(AssertionError):
                    await broken.close()
            for scene, outcome in zip(together, outcomes, strict=True):
                await tell(scene, outcome)
    finally:
        if deployment is not None:
            await deployment.close()
        shutil.rmtree(state_dir, ignore_errors=True)


async def _played(scene: Scene, deployment: Deployment) -> Outcome:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    try:
        row = await scene.play(deployment)
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return error
    row.took_s = loop.time() - begin
    return row


def _with_logs(outcome: Outcome, deployment: Deployment) -> Outcome:
    if isinstance(outcome, BaseException):
        for name, node in deployment.nodes.items():
            tail = "\n    ".join(line for line in node.lines[-60:] if "GET /" not in line)
            outcome.add_note(f"{name}:\n    {tail}")
    return outcome


def run(plane: str, scenes: Sequence[Scene], state_dir: Path, tell: Tell) -> None:
    """`play` on hosts that are made for it."""
    network = Hosts(*host_names())
    with network as hosts, on_host(hosts[0]):
        asyncio.run(play(plane, scenes, network, state_dir, tell))
