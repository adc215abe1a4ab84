"""The settings of a deployment as one process follows and applies them. Rules: `core.settings`."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from stator.core.settings import (
    SETTINGS,
    SETTINGS_PREFIX,
    Changed,
    Document,
    Effect,
    KnownSettings,
    Lost,
    RefusedDocument,
    Value,
    decode,
    encode,
    next_version,
    shown,
)
from stator.discovery.base import RETURN_WINDOW_S, Discovery
from stator.errors import ErrorCode, StatorError
from stator.messages.instances import SettingState
from stator.runtime.tasks import TaskOwner

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class FollowSetting(Protocol):
    """name: of the setting. option: of this service's configuration, which counts while the setting is not set.
    apply: called with every new value, and before this returns if it is not what is configured."""

    def __call__(self, name: str, option: str, apply: Callable[[Any], None]) -> None: ...


@dataclass(slots=True)
class _User:
    configured: Value
    origin: str
    apply: Callable[[Any], None]
    in_force: Value
    version: int = 0


class LiveSettings:
    """Follows the store from `start` to `close`; while it is away, the last values stay. Writes back what a store that
    lost its state has forgotten, spread over return_window_s so that not all processes do."""

    def __init__(self, discovery: Discovery, rng: Random, *, return_window_s: float = RETURN_WINDOW_S) -> None:
        self._discovery = discovery
        self._rng = rng
        self._return_window_s = return_window_s
        self._known = KnownSettings()
        self._users: dict[str, list[_User]] = {}
        self._lost: set[str] = set()
        self._synced = asyncio.Event()
        self._tasks = TaskOwner("settings")

    def start(self) -> None:
        self._tasks.spawn(self._follow(), "follow")

    async def close(self) -> None:
        await self._tasks.close()

    async def wait_synced(self, timeout_s: float) -> None:
        """Returns when the store has told its values, or after timeout_s."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._synced.wait()

    def follow(self, name: str, configured: Value, origin: str, apply: Callable[[Any], None]) -> None:
        """Until `close`. Parameters as of FollowSetting; origin: where configured was written. apply does not raise."""
        user = _User(SETTINGS[name].check(configured), origin, apply, configured)
        self._users.setdefault(name, []).append(user)
        self._apply(name, user)

    def states(self) -> tuple[SettingState, ...]:
        """Of the settings that are used here, by name."""
        return tuple(
            SettingState(name, user.in_force, user.configured, user.origin, user.version, self._known.refused(name))
            for name in sorted(self._users)
            for user in self._users[name]
        )

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._discovery.watch(SETTINGS_PREFIX)) as batches:
            async for batch in batches:
                for effect in self._known.receive(batch):
                    self._carry_out(effect)
                for name, users in self._users.items():
                    # A new version with the value of before is applied too.
                    for user in users:
                        self._apply(name, user)
                self._synced.set()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Changed():
                pass
            case RefusedDocument(name, reason):
                logger.warning(
                    "the store has something for the setting %s that cannot be used, and what was in force stays. "
                    "Write a valid value with `stator config set`. %s",
                    name,
                    reason,
                )
            case Lost(name):
                if name not in self._lost:
                    self._lost.add(name)
                    self._tasks.spawn(self._write_back(name), f"write back {name}")

    def _apply(self, name: str, user: _User) -> None:
        document, value = self._known.document(name), self._known.value(name)
        value = user.configured if value is None else value
        if shown(value) != shown(user.in_force):
            logger.info("%s is %s now; it was %s", name, shown(value), shown(user.in_force))
            user.apply(value)
            user.in_force = value
        user.version = 0 if document is None else document.version

    async def _write_back(self, name: str) -> None:
        try:
            await asyncio.sleep(self._rng.uniform(0.0, self._return_window_s))
            while (work := self._known.write_back(name)) is not None:
                try:
                    if work.only_if_absent:
                        done = await self._discovery.create(work.key, work.data)
                    else:
                        await self._discovery.put(work.key, work.data)
                        done = True
                except StatorError as error:
                    if error.code is not ErrorCode.INSTANCE_LOST:
                        logger.warning("the setting %s is lost from the store: %s", name, error.message)
                        return
                    done = False
                if done:
                    logger.warning("the store was without the setting %s; it was written back", name)
                # Until the watch has told that it is there, from here or from somebody faster.
                await asyncio.sleep(RETRY_S)
        finally:
            self._lost.discard(name)


async def write_setting(discovery: Discovery, name: str, value: Value | None, now_ms: int) -> Document:
    """value: a checked one, None to unset it. Raises StatorError if the store cannot be reached."""
    setting = SETTINGS[name]
    before: Document | None = None
    found = await discovery.get(setting.key)
    if found is not None:
        with contextlib.suppress(ValueError):
            before = decode(setting, found.value)
    document = Document(next_version(before, now_ms), value)
    await discovery.put(setting.key, encode(document))
    return document
