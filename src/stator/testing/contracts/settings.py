"""What settings do on every implementation of the discovery seam. Subclass, and give a world, as for DiscoveryContract.

Each process of a scenario has a client of its own, as real ones do.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from random import Random

from stator.core.settings import SETTINGS, Document, Value, decode, encode
from stator.discovery.base import Discovery
from stator.runtime.settings import LiveSettings, write_setting
from stator.testing.hub_world import LosableWorld, World

PATIENCE_S = 15.0
NAME = "max-local-prefill-length"
CONFIGURED = 64


class Process:
    """Uses one setting, and keeps what was applied."""

    def __init__(self, discovery: Discovery, seed: int, configured: Value = CONFIGURED, name: str = NAME) -> None:
        self.applied: list[Value] = []
        self.settings = LiveSettings(discovery, Random(seed), return_window_s=0.2)
        self.settings.follow(name, configured, "f.yaml:3", self._apply)

    def _apply(self, value: Value) -> None:
        self.applied.append(value)

    @property
    def value(self) -> Value:
        return self.settings.states()[0].value

    @property
    def version(self) -> int:
        return self.settings.states()[0].version


@contextlib.asynccontextmanager
async def processes(world: World, num: int = 2) -> AsyncGenerator[list[Process]]:
    """The first view of the store has arrived at each."""
    made = [Process((await world.connect()).discovery, seed) for seed in range(num)]
    try:
        for process in made:
            process.settings.start()
            await process.settings.wait_synced(PATIENCE_S)
        yield made
    finally:
        for process in made:
            await process.settings.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def stored(discovery: Discovery, version: int) -> Document:
    """What the store has, once that is of the version."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            entry = await discovery.get(SETTINGS[NAME].key)
            if entry is not None and (found := decode(SETTINGS[NAME], entry.value)).version == version:
                return found
            await asyncio.sleep(0.02)


class SettingsContract:
    def run(self, scenario: Callable[[World], Awaitable[None]]) -> None:
        raise NotImplementedError

    def test_a_value_reaches_every_process_and_goes_again(self) -> None:
        async def scenario(world: World) -> None:
            async with processes(world) as (first, second):
                assert (first.value, first.version, first.applied) == (CONFIGURED, 0, [])
                discovery = (await world.connect()).discovery
                written = await write_setting(discovery, NAME, 512, 1000)
                assert written == Document(1000, 512)
                await until(lambda: first.version == second.version == 1000)
                assert first.applied == second.applied == [512]
                again = await write_setting(discovery, NAME, 512, 1000)
                await until(lambda: first.version == second.version == again.version == 1001)
                assert first.applied == [512], "the value is the same"
                await write_setting(discovery, NAME, None, 2000)
                await until(lambda: first.version == second.version == 2000)
                assert first.applied == second.applied == [512, CONFIGURED]

        self.run(scenario)

    def test_a_process_that_comes_later_has_it_from_the_start(self) -> None:
        async def scenario(world: World) -> None:
            party = await world.connect()
            await write_setting(party.discovery, NAME, 512, 1000)
            async with processes(world, 1) as (process,):
                assert (process.value, process.applied) == (512, [512])

        self.run(scenario)

    def test_one_that_begins_to_use_it_later_is_told_at_once(self) -> None:
        async def scenario(world: World) -> None:
            party = await world.connect()
            await write_setting(party.discovery, NAME, 512, 1000)
            async with processes(world, 1) as (process,):
                late: list[Value] = []
                process.settings.follow(NAME, 512, "default", late.append)
                assert late == [], "it has that already"
                process.settings.follow(NAME, 1000, "default", late.append)
                assert late == [512]
                assert [state.configured for state in process.settings.states()] == [CONFIGURED, 512, 1000]

        self.run(scenario)

    def test_what_another_tool_wrote_wrongly_changes_nothing(self) -> None:
        async def scenario(world: World) -> None:
            async with processes(world) as (first, second):
                discovery = (await world.connect()).discovery
                await write_setting(discovery, NAME, 512, 1000)
                await until(lambda: first.version == second.version == 1000)
                await discovery.put(SETTINGS[NAME].key, b"64")
                await until(lambda: all(p.settings.states()[0].refused for p in (first, second)))
                assert first.value == second.value == 512
                # Over it, though the version of before cannot be read there any more.
                await write_setting(discovery, NAME, 32, 1001)
                await until(lambda: first.value == second.value == 32)
                assert not first.settings.states()[0].refused

        self.run(scenario)

    def test_a_key_that_was_deleted_is_written_back(self) -> None:
        async def scenario(world: World) -> None:
            async with processes(world) as (first, second):
                discovery = (await world.connect()).discovery
                await write_setting(discovery, NAME, 512, 1000)
                await until(lambda: first.version == second.version == 1000)
                assert await discovery.delete(SETTINGS[NAME].key)
                assert await stored(discovery, 1000) == Document(1000, 512)
                assert first.applied == second.applied == [512]

        self.run(scenario)

    def test_an_older_document_gives_way_to_what_processes_know(self) -> None:
        async def scenario(world: World) -> None:
            async with processes(world) as (first, second):
                discovery = (await world.connect()).discovery
                await write_setting(discovery, NAME, 512, 1000)
                await until(lambda: first.version == second.version == 1000)
                await discovery.put(SETTINGS[NAME].key, encode(Document(999, 64)))
                assert await stored(discovery, 1000) == Document(1000, 512)
                assert first.applied == second.applied == [512]

        self.run(scenario)

    def test_two_who_write_at_once_leave_one_value_everywhere(self) -> None:
        async def scenario(world: World) -> None:
            async with processes(world, 3) as made:
                parties = [await world.connect() for _ in range(3)]
                written = await asyncio.gather(
                    *(write_setting(p.discovery, NAME, n, 1000 + n) for n, p in enumerate(parties))
                )
                newest = max(document.version for document in written)
                assert await stored(parties[0].discovery, newest) is not None
                await until(lambda: all(process.version == newest for process in made))
                assert len({process.value for process in made}) == 1

        self.run(scenario)


class SettingsLossContract:
    def run_losable(self, scenario: Callable[[LosableWorld], Awaitable[None]]) -> None:
        raise NotImplementedError

    def test_the_last_values_stay_while_the_store_is_away(self) -> None:
        async def scenario(world: LosableWorld) -> None:
            async with processes(world) as (first, second):
                discovery = (await world.connect()).discovery
                await write_setting(discovery, NAME, 512, 1000)
                await until(lambda: first.version == second.version == 1000)
                await world.cut()
                late: list[Value] = []
                first.settings.follow(NAME, CONFIGURED, "f.yaml:9", late.append)
                assert late == [512], "for those too who begin to use it now"
                assert (first.value, second.value) == (512, 512)
                await world.heal()
                await write_setting(discovery, NAME, 32, 2000)
                await until(lambda: first.version == second.version == 2000)
                assert first.applied == second.applied == [512, 32]

        self.run_losable(scenario)

    def test_a_store_that_lost_its_state_is_given_it_back(self) -> None:
        """A restart of the hub, or a wiped etcd, does not take a deployment back to what it is configured with."""

        async def scenario(world: LosableWorld) -> None:
            async with processes(world, 3) as made:
                discovery = (await world.connect()).discovery
                await write_setting(discovery, NAME, 512, 1000)
                await until(lambda: all(process.version == 1000 for process in made))
                await world.lose()
                await world.heal()
                assert await stored(discovery, 1000) == Document(1000, 512)
                assert [process.applied for process in made] == [[512]] * 3
                async with processes(world, 1) as (new,):
                    assert new.value == 512
                # And what is set then is newer than what was given back.
                await write_setting(discovery, NAME, None, 1000)
                await until(lambda: all(process.version == 1001 for process in made))
                assert [process.value for process in made] == [CONFIGURED] * 3

        self.run_losable(scenario)
