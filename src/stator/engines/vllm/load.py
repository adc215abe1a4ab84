"""vLLM's statistics of every step, added up to an EngineLoad."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from stator.messages.engine import EngineLoad


@dataclass(slots=True)
class _Rank:
    num_running: int = 0
    num_skipped: int = 0
    usage: float = 0.0
    num_held: int | None = None


@dataclass(slots=True)
class LoadCounter:
    """num_blocks: of every data-parallel rank, those that sequences may use. changed: set by every record."""

    num_blocks: int
    ranks: dict[int, _Rank] = field(default_factory=dict[int, _Rank])
    totals: dict[str, int] = field(default_factory=dict[str, int])
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def record(self, scheduler: Any, iteration: Any, rank: int) -> None:
        """scheduler: vLLM's SchedulerStats, iteration: its IterationStats, either of them None.

        A step that ended no prompt and made no token, as most of a long chunked prefill, has no IterationStats.
        """
        self.changed.set()
        self._add("steps_total", 1)
        if scheduler is not None:
            before = self.ranks.get(rank)
            counts = scheduler.kv_connector_stats or {}
            self.ranks[rank] = _Rank(
                scheduler.num_running_reqs,
                scheduler.num_skipped_waiting_reqs,
                scheduler.kv_cache_usage,
                counts.get("num_blocks_held", before.num_held if before is not None else None),
            )
        if iteration is None:
            return
        prompt = iteration.prompt_token_stats
        self._add("prompt_tokens_total", prompt.total)
        self._add("prompt_tokens_cached_total", prompt.local_cache_hit)
        self._add("prompt_tokens_computed_total", prompt.computed)
        self._add("prompt_tokens_transferred_total", prompt.external_kv_transfer)
        self._add("generation_tokens_total", iteration.num_generation_tokens)
        self._add("preemptions_total", iteration.num_preempted_reqs)

    @property
    def num_steps(self) -> int:
        return self.totals.get("steps_total", 0)

    def _add(self, name: str, value: int) -> None:
        self.totals[name] = self.totals.get(name, 0) + value

    def load(self, num_open: int, num_first_uses: int = 0) -> EngineLoad:
        """num_open: requests that have not ended. num_first_uses: as in EngineLoad.

        vLLM's own numbers are those of its last step, so that an idle one knows neither of a request that it was just
        given nor of the end of one that was aborted.
        """
        ranks = self.ranks.values()
        num_running = min(num_open, sum(rank.num_running for rank in ranks))
        num_waiting = num_open - num_running
        num_used = sum(round(rank.usage * self.num_blocks) for rank in ranks)
        return EngineLoad(
            num_running=num_running,
            num_waiting=num_waiting,
            num_blocks=self.num_blocks * max(1, len(self.ranks)),
            num_blocks_used=num_used,
            num_blocks_held=sum(self._held(rank, num_open) for rank in ranks),
            num_fetching=min(num_waiting, sum(rank.num_skipped for rank in ranks)),
            num_first_uses=num_first_uses,
            **self.totals,
        )

    def _held(self, rank: _Rank, num_open: int) -> int:
        """By the connector's own count; NIXL has none, and then what nobody runs on is held."""
        if rank.num_held is not None:
            return rank.num_held
        return 0 if num_open else round(rank.usage * self.num_blocks)
