"""Which prefill instances' KV blocks a decode worker may take, and which news of that is worth telling. Pure.

The rule: two engines exchange KV blocks only if their pairings (`EngineInfo.pairing`) are equal. A difference is not
noticed later: the transfer succeeds and the text is wrong.

To one decode worker a prefill instance is *unknown*, *paired* or *refused*:

    unknown, paired --its pairing differs--> refused    Refused
    refused         --differs as before----> refused    nothing: it was told
    refused         --differs otherwise----> refused    Refused
    refused         --is equal now---------> paired     Paired
    refused         --is not there---------> unknown    Left; should it come back, it is told again
    unknown         --is equal-------------> paired     nothing: this is what is expected
    paired          --is not there---------> unknown    nothing
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stator.ids import InstanceId

Pairing = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of two pairings with its values; None where a side says nothing of it."""

    key: str
    here: str | None
    there: str | None

    def words(self, here: str = "here", there: str = "there") -> str:
        """`block_size is 64 here and 32 there`. here, there: how the sides are called."""
        return f"{self.key} is {_value(self.here)} {here} and {_value(self.there)} {there}"


def _value(value: str | None) -> str:
    return "not given" if value is None else value


def differences(here: Pairing, there: Pairing) -> tuple[Difference, ...]:
    """By key; empty if the two engines may exchange KV blocks."""
    keys = sorted(here.keys() | there.keys())
    return tuple(Difference(k, here.get(k), there.get(k)) for k in keys if here.get(k) != there.get(k))


def in_words(found: Sequence[Difference], here: str = "here", there: str = "there") -> str:
    return ", ".join(difference.words(here, there) for difference in found)


@dataclass(frozen=True, slots=True)
class Refused:
    instance_id: InstanceId
    found: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class Paired:
    """Was refused, and no longer is."""

    instance_id: InstanceId


@dataclass(frozen=True, slots=True)
class Left:
    """Was refused, and is not there any more."""

    instance_id: InstanceId


News = Refused | Paired | Left


class PrefillPeers:
    """The prefill instances that one decode worker sees. `update` is the only entry; the attributes are for reading.

    refused: with the differences, this worker's side being `here`. num_paired: may prefill for this worker.
    """

    def __init__(self, pairing: Pairing) -> None:
        self._pairing = pairing
        self.refused: dict[InstanceId, tuple[Difference, ...]] = {}
        self.num_paired = 0

    def update(self, pairings: Mapping[InstanceId, Pairing]) -> list[News]:
        """pairings: of all prefill instances that are there now. Returns what is new about the refused, by instance."""
        before = self.refused
        found = {instance_id: differences(self._pairing, theirs) for instance_id, theirs in pairings.items()}
        self.refused = {instance_id: differing for instance_id, differing in found.items() if differing}
        self.num_paired = len(found) - len(self.refused)
        news: list[News] = []
        for instance_id in sorted(before.keys() | self.refused.keys()):
            now = self.refused.get(instance_id)
            if now is not None:
                if now != before.get(instance_id):
                    news.append(Refused(instance_id, now))
            else:
                news.append(Paired(instance_id) if instance_id in found else Left(instance_id))
        return news
