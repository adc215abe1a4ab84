"""The chaos suite with a hub: no request lost, wrong or doubled, nothing left behind. `make chaos` prints it."""

import pytest
from chaos import judge, suite
from chaos.rows import Scene

PLANE = "embedded"

pytestmark = [pytest.mark.netns, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, suite.Outcome]:
    return judge.play_all(PLANE)


@pytest.mark.parametrize("scene", suite.chosen([], PLANE), ids=lambda scene: scene.number)
def test_scene(scene: Scene, outcomes: dict[str, suite.Outcome]) -> None:
    judge.check(scene, outcomes[scene.number])
