"""One engine over several nodes: this process's part in its group, on discovery. Rules: `core.engine_group`."""

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from stator.core import engine_group as core
from stator.core.engine_group import EngineGroup, read_view
from stator.discovery.base import Discovery, Lease, WatchBatch
from stator.engines.base import NodePlace
from stator.errors import ConfigError, StatorError
from stator.ids import InstanceId
from stator.messages.engine_groups import GroupStart, groups_prefix, offer_key, rank_key, start_key
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

REMIND_EVERY_S = 60.0


class Membership(Protocol):
    """What a process lends its group; `graph.ServiceContext` is one.

    join_command: what starts one more process of this service on another node.
    """

    service: str
    instance_id: InstanceId
    host: str
    discovery: Discovery
    lease: Lease
    tasks: TaskOwner
    join_command: str

    def leave(self, reason: str) -> None:
        """Stop, through no fault of this process, and come back as a new instance."""
        ...

    def follow(self, on_stop: Callable[[], Awaitable[None]]) -> None:
        """This process is part of another instance: it is not announced, and only `on_stop` is run at its end."""
        ...


class GroupShell:
    """Carries the core's effects out, from `join` until the membership's tasks are closed."""

    def __init__(
        self, membership: Membership, *, num_nodes: int, settings: Mapping[str, str], master_port: int | None = None
    ) -> None:
        """settings: must be equal on all nodes. master_port: on rank 0's node; None takes a free one."""
        self._my = membership
        self._core = EngineGroup(
            instance_id=membership.instance_id, host=membership.host, num_nodes=num_nodes, settings=settings
        )
        self._master_port = master_port
        self._entries: dict[str, bytes] = {}
        self._place: asyncio.Future[NodePlace] = asyncio.get_running_loop().create_future()
        self._waiting: core.Waiting | None = None

    async def join(self) -> NodePlace:
        """Wait, for as long as it takes, until every node is there. Raises ConfigError if this one's settings differ
        from theirs, StatorError if discovery fails."""
        following = self._my.tasks.spawn(self._follow(), "follow the engine's group")
        reminding = self._my.tasks.spawn(self._remind(), "remind of missing nodes")
        try:
            await asyncio.wait([following, self._place], return_when=asyncio.FIRST_COMPLETED)
            if not self._place.done():
                await following
                raise asyncio.CancelledError  # The discovery client was closed: the process is ending.
            return self._place.result()
        except BaseException:
            following.cancel()
            raise
        finally:
            reminding.cancel()

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._my.discovery.watch(groups_prefix(self._my.service))) as batches:
            async for batch in batches:
                self._apply(batch)
                try:
                    await self._handle(read_view(self._my.service, self._entries))
                except (ConfigError, StatorError) as error:
                    if self._place.done():
                        raise
                    self._place.set_exception(error)
                    return

    def _apply(self, batch: WatchBatch) -> None:
        if batch.reset:
            self._entries.clear()
        for key in batch.deletes:
            self._entries.pop(key, None)
        self._entries.update({entry.key: entry.value for entry in batch.puts})

    async def _handle(self, event: core.Event) -> None:
        events = deque([event])
        while events:
            for effect in self._core.handle(events.popleft()):
                outcome = await self._carry_out(effect)
                if outcome is not None:
                    events.append(outcome)

    async def _carry_out(self, effect: core.Effect) -> core.Event | None:
        my, discovery, service = self._my, self._my.discovery, self._my.service
        match effect:
            case core.MakeOffer(offer):
                return core.Answer(await discovery.create(offer_key(service), msgspec.msgpack.encode(offer), my.lease))
            case core.TakeRank(group, member):
                key = rank_key(service, group, member.rank)
                return core.Answer(await discovery.create(key, msgspec.msgpack.encode(member), my.lease))
            case core.Withdraw(group, rank):
                logger.info("the first node of the group has ended before the start; looking for another")
                await discovery.delete(rank_key(service, group, rank))
            case core.PublishStart(members):
                return core.Published(await self._publish(GroupStart(members, my.host, self._free_port())))
            case core.Launch(start, rank):
                self._launch(start, rank)
            case core.Waiting():
                self._waiting = effect
                self._tell()
            case core.Refuse(reason):
                raise ConfigError(f"{service}: {reason}")
            case core.Broken(reason):
                my.leave(reason)
        return None

    async def _publish(self, start: GroupStart) -> GroupStart:
        service = self._my.service
        await self._my.discovery.put(start_key(service, start.group), msgspec.msgpack.encode(start), self._my.lease)
        await self._my.discovery.delete(offer_key(service))
        return start

    def _free_port(self) -> int:
        if self._master_port is not None:
            return self._master_port
        # vLLM's rank 0 listens there some seconds from now; the kernel gives the same port to nobody else so soon.
        with socket.create_server(("", 0)) as bound:
            return int(bound.getsockname()[1])

    def _launch(self, start: GroupStart, rank: int) -> None:
        others = ", ".join(f"{m.rank}: {m.host}" for m in start.members if m.rank != rank)
        logger.info("this is node %d of an engine over %d (%s)", rank, len(start.members), others)
        self._waiting = None
        self._place.set_result(
            NodePlace(
                rank=rank,
                hosts=tuple(member.host for member in start.members),
                instance_id=start.members[0].instance_id,
                master_address=start.master_address,
                master_port=start.master_port,
            )
        )

    async def _remind(self) -> None:
        while True:
            await asyncio.sleep(REMIND_EVERY_S)
            self._tell()

    def _tell(self) -> None:
        waiting = self._waiting
        if waiting is None:
            return
        where = "" if waiting.rank == 0 else f", behind {waiting.first}"
        if not waiting.num_missing:
            logger.info("node %d of %d%s: all nodes are there", waiting.rank, waiting.num_nodes, where)
            return
        nodes = "node" if waiting.num_missing == 1 else "nodes"
        logger.warning(
            "node %d of %d%s; waiting for %d more %s: start there\n  %s",
            waiting.rank, waiting.num_nodes, where, waiting.num_missing, nodes, self._my.join_command,
        )  # fmt: skip
