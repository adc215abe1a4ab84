"""Reads an exposition text."""

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Sample:
    name: str
    labels: dict[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    families = text_string_to_metric_families(text)
    return [Sample(s.name, dict(s.labels), s.value) for family in families for s in family.samples]


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """The sum over all series of that name with those labels. Fails when there is none."""
    found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
    assert found, f"no series {name}{labels}"
    return sum(found)
