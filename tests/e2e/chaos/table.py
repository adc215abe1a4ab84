"""The table of what scenes came to."""

from chaos.rows import Row, Scene

HEADINGS = (
    *("#", "scene", "plane", "sent", "completed", "refused", "cut", "wrong", "lost", "doubled"),
    *("gap ms", "recovery s", "free s", "left", "took s"),
)


def heading() -> str:
    return "| " + " | ".join(HEADINGS) + " |\n" + "|---" * len(HEADINGS) + "|"


def line(scene: Scene, plane: str, row: Row) -> str:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    counts = (row.sent, row.completed, row.refused, row.cut, row.wrong, row.lost, row.doubled)
    cells = [
        *(scene.number, scene.name, plane, *map(str, counts)),
        number(None if row.gap_s is None else row.gap_s * 1e3, "{:.0f}"),
        number(row.recovery_s, "{:.1f}"),
        number(row.free_s, "{:.2f}"),
        f"{row.blocks_left}, {row.processes_left}",
        f"{row.took_s:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def promise(scene: Scene) -> str:
    """The guide's row: what does not depend on a run."""
    return f"| {scene.number} | {scene.name} | {scene.promise} | {scene.see} |"
