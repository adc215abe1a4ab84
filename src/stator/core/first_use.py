"""What an engine is asked for that it has not done before. Pure.

Engines compile kernels when something is first asked for: vLLM those for probabilities with the first request that
wants some, which took 14 s on two CPU cores with empty caches (vLLM 0.32, 2026-12). Such a step is slow, not hung
(`core.progress`), however many steps the engine has made before.
"""

from collections.abc import Hashable

import msgspec

from stator.messages.engine import EngineRequest, SamplingParams

_CHANGES_NO_KERNEL = {"max_tokens", "stop_token_ids", "ignore_eos"}
_ONE_USE_EACH = {"temperature", "seed", "seed_drawn"}
_DEFAULTS = tuple(
    (field.encode_name, field.default)
    for field in msgspec.structs.fields(SamplingParams)
    if field.encode_name not in _CHANGES_NO_KERNEL | _ONE_USE_EACH
)


def uses_of(request: EngineRequest) -> frozenset[str]:
    """By name, what generating for this request needs of an engine: one name for each way to draw a token and for each
    field that differs from its default."""
    sampling = request.sampling
    uses = {name for name, default in _DEFAULTS if getattr(sampling, name) != default}
    if sampling.temperature == 0:
        uses.add("greedy")
    else:
        uses.add("random" if sampling.seed is None or sampling.seed_drawn else "seeded")
    if request.lora_name is not None:
        uses.add("lora")
    if request.transfer is not None:
        uses.add("transfer")
    return frozenset(uses)


class FirstUses:
    """Of one engine, from its start. A job is whatever it was asked to do, by any key."""

    def __init__(self) -> None:
        self._made: frozenset[str] = frozenset()
        self._open: dict[Hashable, frozenset[str]] = {}

    def begin(self, job: Hashable, uses: frozenset[str]) -> None:
        if not uses <= self._made:
            self._open[job] = uses

    def made(self, job: Hashable) -> None:
        """It has given a result, if only the first of several: what it uses is there now."""
        if (uses := self._open.pop(job, None)) is not None:
            self._made |= uses
            self._open = {job: uses for job, uses in self._open.items() if not uses <= self._made}

    def end(self, job: Hashable) -> None:
        """With or without a result."""
        self._open.pop(job, None)

    @property
    def num_open(self) -> int:
        """Jobs that have given no result yet and use what no job before has used."""
        return len(self._open)
