"""vLLM's statistics of every step, added up to an EngineLoad."""

from dataclasses import dataclass, field
from typing import Any

from stator.messages.engine import EngineLoad


@dataclass(slots=True)
class _Rank:
    num_running: int = 0
    num_waiting: int = 0
    usage: float = 0.0
    num_held: int | None = None


@dataclass(slots=True)
class LoadCounter:
    """num_blocks: of every data-parallel rank, those that sequences may use."""

    num_blocks: int
    ranks: dict[int, _Rank] = field(default_factory=dict[int, _Rank])
    totals: dict[str, int] = field(default_factory=dict[str, int])

    def record(self, scheduler: Any, iteration: Any, rank: int) -> None:
        """scheduler: vLLM's SchedulerStats, iteration: its IterationStats, either of them None."""
        if scheduler is not None:
            before = self.ranks.get(rank)
            counts = scheduler.kv_connector_stats or {}
            self.ranks[rank] = _Rank(
                scheduler.num_running_reqs,
                scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs,
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
        self._add("steps_total", 1)

    def _add(self, name: str, value: int) -> None:
        self.totals[name] = self.totals.get(name, 0) + value

    def load(self, num_starting: int = 0) -> EngineLoad:
        """num_starting: requests that vLLM has not been given yet."""
        ranks = self.ranks.values()
        num_running = sum(rank.num_running for rank in ranks)
        num_used = sum(round(rank.usage * self.num_blocks) for rank in ranks)
        return EngineLoad(
            num_running=num_running,
            num_waiting=sum(rank.num_waiting for rank in ranks) + num_starting,
            num_blocks=self.num_blocks * max(1, len(self.ranks)),
            num_blocks_used=num_used,
            num_blocks_held=sum(self._held(rank) for rank in ranks),
            **self.totals,
        )

    def _held(self, rank: _Rank) -> int:
        """By the connector's own count; NIXL has none, and then what nobody runs on is held."""
        if rank.num_held is not None:
            return rank.num_held
        return 0 if rank.num_running or rank.num_waiting else round(rank.usage * self.num_blocks)
