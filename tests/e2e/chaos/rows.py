"""What a scene comes to, and how it is counted."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase

from chaos.deployment import Deployment
from chaos.load import Body, Load, Stream

FREE_WITHIN_S = 1.0
"""Blocks of a client that left, on a machine that is not busy otherwise."""

SETTLED_WITHIN_S = 35.0
"""Blocks of everything else: what a dead decode worker had asked for is held for TRANSFER_HOLD_S."""


@dataclass
class Row:
    """Requests: sent; completed; refused, with one clear error; cut, by a client that left or the death of the very
    Frontend; wrong, another text than undisturbed; lost, anything else. doubled: characters of text that came twice.

    Seconds, None where they do not apply. gap_s: the longest silence in any disturbed stream from the fault on.
    recovery_s: from the fault until all workers were there again. free_s: until no worker had a block in use.
    took_s: the whole scene.
    """

    sent: int
    completed: int
    refused: int
    cut: int
    wrong: int
    lost: int
    doubled: int
    gap_s: float | None = None
    recovery_s: float | None = None
    free_s: float | None = None
    blocks_left: int = 0
    processes_left: int = 0
    took_s: float = 0.0
    notes: list[str] = field(default_factory=list[str])

    @property
    def faults(self) -> dict[str, int]:
        """What should be zero and is not."""
        names = ("wrong", "lost", "doubled", "blocks_left", "processes_left")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


Play = Callable[[Deployment], Awaitable[Row]]


@dataclass(frozen=True)
class Scene:
    """number: of the 24, with a letter for a part of it. promise: for the reader of the guide. see: how a user sees it
    happen. lane: the deployment that it is played on. planes: where it means something. may_refuse: some requests may
    be refused. beside: the next scene of the lane is played at the same time."""

    number: str
    name: str
    promise: str
    see: str
    play: Play
    lane: str = "text"
    planes: tuple[str, ...] = ("embedded", "external")
    may_refuse: bool = False
    beside: bool = False

    @property
    def whole(self) -> str:
        """Its number without the letter."""
        return self.number.rstrip(ascii_lowercase)


def doubled(text: str, expected: str) -> int:
    """Characters that came twice in a row: those to be left out so that it is the expected text, or begins it."""
    pairs = enumerate(zip(text, expected, strict=False))
    same = next((n for n, (a, b) in pairs if a != b), min(len(text), len(expected)))

    def is_twice(n: int) -> bool:
        again = text[same : same + n] == text[max(0, same - n) : same]
        return again and expected.startswith(text[:same] + text[same + n :])

    return next((n for n in range(1, len(text) - same + 1) if is_twice(n)), 0)


async def settle(
    deployment: Deployment,
    streams: Sequence[Stream],
    *,
    disturbed: Sequence[Stream] | None = None,
    cut: Sequence[Stream] = (),
    since: float | None = None,
    whole: bool = True,
) -> Row:
    """Wait until all is well again, then compare with what the same requests get while nothing is broken.

    disturbed: those whose gaps count, by default all. since: the fault. whole: wait for all workers.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time() if since is None else since
    gaps = [s.gap_s(begin) for s in (streams if disturbed is None else disturbed) if s.completed]
    if whole:
        await deployment.whole()
    recovery_s = loop.time() - begin
    free_s = await deployment.until_free(SETTLED_WITHIN_S)
    blocks_left = 0 if free_s is not None else await deployment.blocks_used()
    completed = [s for s in streams if s.completed]
    refused = [s for s in streams if not s.completed and s not in cut and s.failed_cleanly]
    partial = [*refused, *cut]
    await deployment.learn([s.body for s in (*completed, *partial)])
    wrong = [s for s in completed if s.text != deployment.expected(s)]
    wrong += [s for s in partial if not deployment.expected(s).startswith(s.text)]
    twice = sum(doubled(s.text, deployment.expected(s)) for s in wrong)
    miscounted = [s for s in completed if s not in wrong and s.num_tokens != deployment.expected_tokens(s)]
    lost = [s for s in streams if s not in completed and s not in partial]
    notes = [str(e) for s in (*refused, *lost) for e in s.errors][:3]
    notes += [f"{len(miscounted)} answers with another number of tokens"] if miscounted else []
    return Row(
        sent=len(streams),
        completed=len(completed),
        refused=len(refused),
        cut=len(cut),
        wrong=len(wrong) + len(miscounted),
        lost=len(lost),
        doubled=twice,
        gap_s=max(gaps, default=None) if since is not None else None,
        recovery_s=recovery_s if since is not None else None,
        free_s=free_s,
        blocks_left=blocks_left,
        processes_left=max(0, deployment.count_processes() - deployment.num_processes),
        notes=notes,
    )


Fault = Callable[[], Awaitable[None]]


async def disturb(
    deployment: Deployment,
    bodies: list[Body],
    when: Callable[[list[Stream]], Awaitable[None]],
    fault: Fault,
    *,
    load: Load | None = None,
    also: list[Stream] | None = None,
) -> Row:
    """Start bodies, wait for `when`, the fault, their ends. also: streams that the fault sends, and waits for."""
    load = load or deployment.load
    streams = load.start(bodies)
    await when(streams)
    since = asyncio.get_running_loop().time()
    await fault()
    await load.finish(streams)
    return await settle(deployment, [*streams, *(also or ())], disturbed=streams, since=since)
