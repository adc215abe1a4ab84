"""How long steps take, by engine, model and device: data that the router predicts with and the sim engine plays.

A simulated worker says in `EngineInfo.device` which row it plays and how fast (`simulated_device`), so that the router
predicts it exactly, whatever model its tokens are from.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import msgspec

from stator.config.decode import nearest
from stator.core.cost import StepTime, StepTimeRow, find_row
from stator.errors import ConfigError
from stator.messages.engine import EngineInfo

SIM_ENGINE = "sim"

_SIMULATED = "simulated"
_SPEED = " at speed "


class KvFacts(msgspec.Struct, frozen=True):
    """What a simulation of a row's model needs to know of its KV cache.

    bytes_per_token: keys and values, all layers. num_tokens: that the cache holds. transfer_gb_per_s: 10^9 bytes a
    second from a prefill engine. source: where these are from.
    """

    bytes_per_token: int
    num_tokens: int
    transfer_gb_per_s: float
    source: str

    def transfer_s(self, num_tokens: int) -> float:
        """Time that the KV of so many tokens takes on the link."""
        return num_tokens * self.bytes_per_token / (self.transfer_gb_per_s * 1e9)


@dataclass(frozen=True, slots=True)
class NamedRow:
    """A row of the table, with what only a simulation needs."""

    name: str
    row: StepTimeRow
    kv: KvFacts


@dataclass(frozen=True, slots=True)
class StepTimes:
    """The shipped table. named: of the same rows, those that can be simulated."""

    rows: tuple[StepTimeRow, ...]
    fallback: StepTime
    named: tuple[NamedRow, ...] = ()

    def of(self, info: EngineInfo | None) -> StepTime | None:
        """None when no row matches."""
        if info is None:
            return None
        if info.engine == SIM_ENGINE:
            return _of_simulated(self, info.device)
        row = find_row(self.rows, engine=info.engine, model=info.model_id or info.model, device=info.device)
        return None if row is None else row.step_time

    def to_simulate(self, name: str | None, model: str) -> NamedRow:
        """The row of that name; without one, the first whose model matches.

        Raises ConfigError, with all names, if there is none.
        """
        if name is not None:
            found = next((each for each in self.named if each.name == name), None)
        else:
            found = next((each for each in self.named if each.row.matches_model(model)), None)
        if found is not None:
            return found
        names = [each.name for each in self.named]
        if name is not None:
            raise ConfigError(f"step-times is {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        raise ConfigError(
            f"step-times is not set, and there are none for the model {model}; "
            f"choose one to simulate: {', '.join(names)}"
        )


def simulated_device(name: str, speed: float) -> str:
    """EngineInfo.device of a simulation: `simulated 405b-h100-fp8 at speed 10`."""
    return f"{_SIMULATED} {name}" if speed == 1.0 else f"{_SIMULATED} {name}{_SPEED}{speed!r}"


@lru_cache(maxsize=256)
def _of_simulated(table: StepTimes, device: str) -> StepTime | None:
    # The same object for the same kind of worker: the router prices workers of one step time together.
    kind, _, rest = device.partition(" ")
    name, _, speed = rest.partition(_SPEED)
    found = next((each for each in table.named if each.name == name), None)
    if kind != _SIMULATED or found is None:
        return None
    try:
        factor = 1.0 / float(speed or 1.0)
    except (ValueError, ZeroDivisionError):
        return None
    return found.row.step_time if factor == 1.0 else found.row.step_time.scaled(factor)


@cache
def shipped_step_times() -> StepTimes:
    table = tomllib.loads((files("stator.config") / "step_times.toml").read_text(encoding="utf-8"))
    rows: Sequence[Mapping[str, Any]] = table["row"]
    named = tuple(NamedRow(r["name"], _row(r), _kv_facts(r)) for r in rows)
    return StepTimes(tuple(each.row for each in named), _step_time(table["fallback"]), named)


def _row(row: Mapping[str, Any]) -> StepTimeRow:
    return StepTimeRow(row["engine"], row["model"], row["device"], _step_time(row), row["source"])


def _kv_facts(row: Mapping[str, Any]) -> KvFacts:
    return KvFacts(row["kv_bytes_per_token"], row["kv_tokens"], row["transfer_gb_per_s"], row["kv_source"])


def _step_time(row: Mapping[str, Any]) -> StepTime:
    return StepTime(*(float(row[name]) for name in ("a", "b", "c", "d0", "d1", "d2")))
