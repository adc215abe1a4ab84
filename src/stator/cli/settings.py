"""`stator config`: settings that apply while a deployment runs. What the commands do; `cli.config` declares them."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.table import Table

from stator.cli.control import ControlOptions, Deployment, connected
from stator.cli.control_plane import ANSWER_TIMEOUT_S
from stator.config.decode import nearest
from stator.core.settings import SETTINGS, Document, InvalidSetting, Setting, Value, decode, shown
from stator.errors import ConfigError, ErrorCode, StatorError
from stator.messages.instances import STATUS_ENDPOINT, InstanceInfo, InstanceStatus, SettingState, StatusRequest
from stator.runtime.context import loop_time
from stator.runtime.settings import write_setting

POLL_S = 0.1

Say = Callable[[str], None]


class Configured(msgspec.Struct, frozen=True):
    """What num_processes are configured with. origin: the place in a file, a flag, or `default`."""

    value: Value
    origin: str
    num_processes: int


class SettingView(msgspec.Struct, frozen=True):
    """A setting as it is now.

    value: what counts; null if it is not set and processes are configured differently. source: `set`, `configured`, or
    `default`: not set, and no process that uses it runs. version: of what is set, null without. invalid: what is wrong
    with what the store has, null if nothing is. num_processes: that use it, of which num_applied have applied what is
    set; num_silent: that did not answer, and may use it.
    """

    name: str
    value: Value | None
    source: str
    default: Value
    version: int | None
    invalid: str | None
    configured: list[Configured]
    num_processes: int
    num_applied: int
    num_silent: int


@dataclass(frozen=True, slots=True)
class Processes:
    """By host and pid. answers: what each uses; silent: processes that did not answer."""

    answers: list[tuple[str, tuple[SettingState, ...]]]
    silent: list[str]

    def using(self, name: str) -> list[tuple[str, SettingState]]:
        return [(label, state) for label, states in self.answers for state in states if state.name == name]


def find_setting(name: str) -> Setting:
    """Dashes or underscores, as in a configuration. Raises ConfigError."""
    setting = SETTINGS.get(name.replace("_", "-").lower())
    if setting is None:
        known = ", ".join(SETTINGS)
        raise ConfigError(f"there is no setting {name}{nearest(name, list(SETTINGS))}; the settings: {known}")
    return setting


def parse_value(setting: Setting, text: str) -> Value:
    """Raises ConfigError."""
    try:
        return setting.parse(text)
    except InvalidSetting as error:
        raise ConfigError(f"{error}{nearest(text, list(setting.choices))}") from None


async def read_settings(options: ControlOptions, names: Iterable[str] = tuple(SETTINGS)) -> list[SettingView]:
    """Raises ConfigError for an unknown name, or if the control plane cannot be reached."""
    settings = [find_setting(name) for name in names]
    async with connected(options) as deployment:
        processes = await ask_processes(deployment)
        return [await _view(deployment, setting, processes) for setting in settings]


class Change(msgspec.Struct, frozen=True):
    """What became of a change. late: processes that have not applied it in time, or not said so."""

    written: Value | None
    setting: SettingView
    late: list[str]


async def change_setting(options: ControlOptions, name: str, text: str | None, timeout_s: float) -> Change:
    """Write it, None to unset it, and wait up to timeout_s for every process that uses it to apply it.

    Raises ConfigError for a name or value that is not valid or if the control plane cannot be reached, StatorError if
    the value could not be written, or another was meanwhile."""
    setting = find_setting(name)
    name = setting.name
    value = None if text is None else parse_value(setting, text)
    async with connected(options) as deployment:
        discovery = deployment.planes.discovery
        written = await write_setting(discovery, name, value, time.time_ns() // 1_000_000)
        deadline = loop_time() + timeout_s
        while True:
            processes = await ask_processes(deployment)
            view = await _view(deployment, setting, processes)
            # An older one, written over it late, gives way: processes write the newer one back.
            if view.version is not None and view.version > written.version:
                raise StatorError(
                    ErrorCode.INVALID_REQUEST, f"{name} was changed by somebody else meanwhile: see `stator config get`"
                )
            late = [label for label, state in processes.using(name) if state.version < written.version]
            if not (late or processes.silent) or loop_time() >= deadline:
                return Change(value, view, late + processes.silent)
            await asyncio.sleep(POLL_S)


async def ask_processes(deployment: Deployment) -> Processes:
    """Every process of the deployment once, though it may have several instances."""
    by_process = {(info.host, info.pid): info for _, info in await deployment.entries() if _tells(info)}
    found = await asyncio.gather(*(_ask(deployment, info) for info in by_process.values()))
    labels = [f"{info.instance_id} on {info.host}" for info in by_process.values()]
    labelled = list(zip(labels, found, strict=True))
    answers = [(label, states) for label, states in labelled if states is not None]
    return Processes(answers, [label for label, states in labelled if states is None])


def _tells(info: InstanceInfo) -> bool:
    return STATUS_ENDPOINT in info.endpoints


async def _ask(deployment: Deployment, info: InstanceInfo) -> tuple[SettingState, ...] | None:
    try:
        status = await deployment.ask(info, STATUS_ENDPOINT, StatusRequest(), InstanceStatus, ANSWER_TIMEOUT_S)
    except StatorError:
        return None
    return status.settings


async def _view(deployment: Deployment, setting: Setting, processes: Processes) -> SettingView:
    entry = await deployment.planes.discovery.get(setting.key)
    document: Document | None = None
    invalid: str | None = None
    if entry is not None:
        try:
            document = decode(setting, entry.value)
        except InvalidSetting as error:
            invalid = str(error)
    return view_of(setting, document, invalid, processes)


def view_of(setting: Setting, document: Document | None, invalid: str | None, processes: Processes) -> SettingView:
    users = [state for _, state in processes.using(setting.name)]
    counts: dict[tuple[str, str], list[SettingState]] = {}
    for state in users:
        counts.setdefault((state.origin, shown(state.configured)), []).append(state)
    configured = [Configured(same[0].configured, origin, len(same)) for (origin, _), same in sorted(counts.items())]
    in_force = {shown(state.value): state.value for state in users}
    value: Value | None
    if document is not None and document.value is not None:
        value, source = document.value, "set"
    elif invalid is not None and len(in_force) == 1:
        # What was in force before somebody wrote that stays.
        value, source = next(iter(in_force.values())), "configured" if _as_configured(users) else "set"
    elif not users:
        value, source = setting.default, "default"
    else:
        different = {shown(state.configured) for state in users}
        value, source = (users[0].configured if len(different) == 1 else None), "configured"
    version = 0 if document is None else document.version
    return SettingView(
        setting.name,
        value,
        source,
        setting.default,
        version or None,
        invalid,
        configured,
        len(users),
        sum(state.version >= version and not state.refused for state in users),
        len(processes.silent),
    )


def _as_configured(users: Sequence[SettingState]) -> bool:
    return all(shown(state.value) == shown(state.configured) for state in users)


# For people.


def describe_change(change: Change) -> list[str]:
    """What `set` and `unset` say."""
    view = change.setting
    if change.written is not None:
        what = f"{view.name} is {shown(change.written)}"
    elif view.value is None:
        what = f"{view.name} is not set; each process has what it is configured with"
    else:
        what = f"{view.name} is not set; it is {shown(view.value)} ({view.source})"
    if not view.num_processes and not change.late:
        return [f"{what}; no process uses it now"]
    applied = f"{what}; applied by {view.num_applied} of {view.num_processes} processes"
    return [applied, *(f"  not yet by {label}" for label in change.late)]


def show_settings(views: Sequence[SettingView], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SETTING", "VALUE", "FROM", "CONFIGURED", "APPLIED"):
        table.add_column(column, overflow="fold")
    for view in views:
        table.add_row(
            view.name,
            "different" if view.value is None else shown(view.value),
            view.source,
            "\n".join(_configured(one, len(view.configured)) for one in view.configured)
            or f"{shown(view.default)} (default)",
            f"{view.num_applied} of {view.num_processes}" if view.num_processes else "not used",
        )
    console.print(table, highlight=False)
    for view in views:
        if view.invalid is not None:
            console.print(
                f"{view.name}: the store has something that cannot be used, and is not: {view.invalid}. Write a valid "
                f"value, or `stator config unset {view.name}`",
                highlight=False,
                markup=False,
            )
    if views and views[0].num_silent:
        console.print(f"{views[0].num_silent} processes did not answer, and may use settings", highlight=False)


def _configured(one: Configured, num: int) -> str:
    count = f", {one.num_processes} processes" if num > 1 else ""
    return f"{shown(one.value)} ({one.origin}{count})"
