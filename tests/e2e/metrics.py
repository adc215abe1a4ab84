"""Reads an exposition text."""

import time
from collections.abc import Callable
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


def eventually(
    scrape: Callable[[], list[Sample]], holds: Callable[[list[Sample]], bool], timeout_s: float = 10
) -> list[Sample]:
    """Scrapes until it holds: workers report once a second, so that what a client has seen may still be on its way.
    Fails with the last scrape's worker figures."""
    deadline = time.monotonic() + timeout_s
    while not holds(samples := scrape()):
        if time.monotonic() > deadline:
            figures = "\n".join(str(s) for s in samples if s.name.startswith("stator_worker"))
            raise AssertionError(f"still not so after {timeout_s:g} s:\n{figures}")
    return samples
