"""What the chaos suite says of itself."""

from pathlib import Path

from chaos import suite, table
from chaos.rows import doubled

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "failures.md"


def test_the_guide_has_every_scene() -> None:
    guide = GUIDE.read_text()
    assert [scene.number for scene in suite.SCENES if table.promise(scene) not in guide] == []


def test_all_of_the_24_are_played_on_both_planes() -> None:
    for plane in ("embedded", "external"):
        numbers = {int(scene.whole) for scene in suite.chosen([], plane)}
        # A hub is one member: there is nothing to lose one of three of.
        assert set(range(1, 25)) - numbers == ({12} if plane == "embedded" else set())


def test_scenes_are_chosen_by_number_and_by_word() -> None:
    assert {scene.number for scene in suite.chosen(["4"], "embedded")} == {"4", "4b", "4c"}
    assert {scene.number for scene in suite.chosen(["4b"], "embedded")} == {"4b"}
    assert "9" in {scene.number for scene in suite.chosen(["killed"], "embedded")}


def test_text_that_came_twice_is_counted() -> None:
    assert doubled("the fox and", "the fox and the owl") == 0
    assert doubled("the fox fox and", "the fox and the owl") == 4
    assert doubled("the cat", "the fox and the owl") == 0
