"""The suite as tests: every scene of one plane is played once, then each is judged by itself."""

import tempfile
from pathlib import Path

from chaos import suite
from chaos.rows import FREE_WITHIN_S, Row, Scene

FREE_ON_A_BUSY_MACHINE_S = 5 * FREE_WITHIN_S
"""Both lanes of both planes may share two cores: their processes take turns."""


def play_all(plane: str) -> dict[str, suite.Outcome]:
    """By the scene's number. Minutes."""
    outcomes: dict[str, suite.Outcome] = {}

    async def keep(scene: Scene, outcome: suite.Outcome) -> None:
        outcomes[scene.number] = outcome

    # Not pytest's: its names are too long for a Unix socket.
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        suite.run(plane, suite.chosen([], plane), Path(directory), keep)
    return outcomes


def check(scene: Scene, outcome: suite.Outcome) -> None:
    """Raises AssertionError, or what the scene itself ended with."""
    if not isinstance(outcome, Row):
        raise outcome
    assert not outcome.faults, outcome
    assert outcome.sent == outcome.completed + outcome.refused + outcome.cut, outcome
    assert outcome.refused == 0 or scene.may_refuse, outcome
    if scene.name.startswith("client leaves"):
        assert outcome.free_s is not None and outcome.free_s < FREE_ON_A_BUSY_MACHINE_S, outcome
