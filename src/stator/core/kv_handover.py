"""Book-keeping of KV blocks that pass between two paged engines: which step starts, holds, loads and frees what.

Pure: an engine's scheduler side asks `HandoverBook`, its workers do what each step's `StepWork` says and report back.

A prefill (`started`) is announced to the workers with the step that computes it, before anybody can learn its transfer
id. When it has finished, its blocks are held (`prefill_finished` returned True) until the workers report them as sent,
which happens exactly once per hold. A prefill that was aborted is withdrawn; its blocks were never held.

A decode request with a transfer is loaded at most once. Either `num_loadable` and `load_started` give it blocks to
fill, and the workers report it as received exactly once, whether all, some or none came; or nothing is to be loaded,
and the peer is told to release. What a load could not fill the engine computes itself.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from stator.ids import InstanceId, RequestId, TransferId


class PrefillParams(msgspec.Struct, frozen=True):
    """What asks an engine for a prefill whose blocks are to be held; key names of vLLM's `kv_transfer_params`."""

    transfer_id: TransferId
    do_remote_decode: bool


class LoadParams(msgspec.Struct, frozen=True):
    """What a prefill engine answers, and a decode engine gets, in the key names of vLLM's `kv_transfer_params`.

    remote_addresses: of the prefill engine's workers, one tuple each, pipeline rank first and tensor rank within.
    remote_num_tokens: leading tokens whose KV is held.
    """

    transfer_id: TransferId
    remote_instance_id: InstanceId
    remote_addresses: tuple[tuple[str, ...], ...]
    remote_num_tokens: int
    block_size: int
    tp_size: int
    pp_size: int
    do_remote_prefill: bool = True


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep block_ids, in order, and serve them as transfer_id; report request_id as sent when that has ended."""

    transfer_id: TransferId
    request_id: RequestId
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """Fill block_ids with the peer's blocks first_block, first_block + 1, ..; then release them at the peer."""

    request_id: RequestId
    source: LoadParams
    first_block: int
    block_ids: tuple[int, ...]


@dataclass(slots=True)
class StepWork:
    """What one step tells every worker; in this order."""

    announced: list[TransferId] = field(default_factory=list[TransferId])
    withdrawn: list[TransferId] = field(default_factory=list[TransferId])
    holds: list[Hold] = field(default_factory=list[Hold])
    loads: list[Load] = field(default_factory=list[Load])
    releases: list[LoadParams] = field(default_factory=list[LoadParams])

    def __bool__(self) -> bool:
        """Whether there is anything to do: most steps transfer nothing."""
        return bool(self.announced or self.withdrawn or self.holds or self.loads or self.releases)


@dataclass(frozen=True, slots=True)
class HandoverCounts:
    """num_*: now. *_total: since the start."""

    num_transfers_held: int = 0
    num_blocks_held: int = 0
    num_loading: int = 0
    holds_total: int = 0
    loads_total: int = 0
    loads_failed_total: int = 0


def parse_load(params: dict[str, Any], *, block_size: int, num_workers: tuple[int, int]) -> LoadParams:
    """num_workers: own (pipeline, tensor) parallel sizes. Raises ValueError, saying what does not fit."""
    try:
        parsed = msgspec.convert(params, LoadParams)
    except msgspec.ValidationError as error:
        raise ValueError(f"not the transfer parameters of this connector: {error}") from error
    if parsed.block_size != block_size:
        raise ValueError(f"the prefill engine has blocks of {parsed.block_size} tokens, this one of {block_size}")
    if (parsed.pp_size, parsed.tp_size) != num_workers:
        raise ValueError(
            f"the prefill engine runs on {parsed.pp_size} x {parsed.tp_size} workers (pipeline x tensor parallel), "
            f"this one on {num_workers[0]} x {num_workers[1]}"
        )
    if len(parsed.remote_addresses) != parsed.pp_size * parsed.tp_size or not all(parsed.remote_addresses):
        raise ValueError("the prefill engine's workers are not all named")
    return parsed


class HandoverBook:
    """One engine's, for both roles. Every request id is the engine's own."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._work = StepWork()
        self._prefills: dict[RequestId, TransferId] = {}
        self._held: dict[RequestId, int] = {}
        self._loading: dict[RequestId, tuple[int, ...]] = {}
        self._failed: set[RequestId] = set()
        self._holds_total = 0
        self._loads_total = 0
        self._loads_failed_total = 0

    def prefill_started(self, request_id: RequestId, transfer_id: TransferId) -> None:
        """Again after a preemption is the same as once."""
        if request_id not in self._prefills:
            self._prefills[request_id] = transfer_id
            self._work.announced.append(transfer_id)

    def prefill_finished(self, request_id: RequestId, block_ids: Sequence[int]) -> bool:
        """block_ids: computed, in order; none if it did not finish. True: they must stay until reported as sent."""
        transfer_id = self._prefills.pop(request_id, None)
        if transfer_id is None:
            return False
        if not block_ids:
            self._work.withdrawn.append(transfer_id)
            return False
        self._held[request_id] = len(block_ids)
        self._holds_total += 1
        self._work.holds.append(Hold(transfer_id, request_id, tuple(block_ids)))
        return True

    def num_loadable(self, source: LoadParams, num_prompt_tokens: int, num_computed_tokens: int) -> int:
        """Tokens that a load would add to those computed here. The prompt's last token is never loaded: computing it
        is what samples the first output token. Changes nothing."""
        return max(0, self._end_of_load(source, num_prompt_tokens) - num_computed_tokens)

    def load_started(
        self,
        request_id: RequestId,
        source: LoadParams,
        block_ids: Sequence[int],
        num_prompt_tokens: int,
        num_external_tokens: int,
    ) -> None:
        """block_ids: all of the request's, from its first token on. num_external_tokens: how many the engine will take
        from the load, 0 for none; they end where `num_loadable` says."""
        if num_external_tokens <= 0:
            self._work.releases.append(source)
            return
        end = self._end_of_load(source, num_prompt_tokens)
        first = (end - num_external_tokens) // self._block_size
        stop = -(-end // self._block_size)
        wanted = tuple(block_ids[first:stop])
        self._loading[request_id] = wanted
        self._loads_total += 1
        self._work.loads.append(Load(request_id, source, first, wanted))

    def load_unused(self, source: LoadParams) -> None:
        """The request ended before it was given blocks."""
        self._work.releases.append(source)

    def workers_reported(
        self, sent: Iterable[RequestId], received: Iterable[RequestId], failed_block_ids: Iterable[int]
    ) -> None:
        """What all workers have in common: each id comes once."""
        failed = set(failed_block_ids)
        if failed:
            self._failed.update(name for name, block_ids in self._loading.items() if not failed.isdisjoint(block_ids))
        for request_id in sent:
            self._held.pop(request_id, None)
        for request_id in received:
            self._loading.pop(request_id, None)
            if request_id in self._failed:
                self._failed.remove(request_id)
                self._loads_failed_total += 1

    def take_work(self) -> StepWork:
        """What has come up since the last call."""
        work, self._work = self._work, StepWork()
        return work

    def counts(self) -> HandoverCounts:
        return HandoverCounts(
            num_transfers_held=len(self._held),
            num_blocks_held=sum(self._held.values()),
            num_loading=len(self._loading),
            holds_total=self._holds_total,
            loads_total=self._loads_total,
            loads_failed_total=self._loads_failed_total,
        )

    def _end_of_load(self, source: LoadParams, num_prompt_tokens: int) -> int:
        return min(source.remote_num_tokens, num_prompt_tokens - 1)


class WorkerReport:
    """What one worker has to report; each request id comes once in each of `sent` and `received`."""

    def __init__(self) -> None:
        self._sent: set[str] = set()
        self._received: set[str] = set()
        self._failed_block_ids: set[int] = set()

    def sent(self, request_id: RequestId) -> None:
        self._sent.add(request_id)

    def received(self, request_id: RequestId, failed_block_ids: Iterable[int] = ()) -> None:
        """failed_block_ids: of its blocks, those that hold nothing; they are reported no later than the request."""
        self._failed_block_ids.update(failed_block_ids)
        self._received.add(request_id)

    def take_ended(self) -> tuple[set[str], set[str]]:
        """(sent, received) since the last call."""
        taken = self._sent, self._received
        self._sent, self._received = set(), set()
        return taken

    def take_failed_block_ids(self) -> set[int]:
        taken, self._failed_block_ids = self._failed_block_ids, set()
        return taken
