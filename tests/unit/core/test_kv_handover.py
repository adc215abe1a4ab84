from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stator.core.kv_handover import HandoverBook, LoadParams, StepWork, WorkerReport, parse_load
from stator.ids import InstanceId, RequestId, TransferId

SIZE = 4


def peer(name: str = "t", num_tokens: int = 10) -> LoadParams:
    return LoadParams(TransferId(name), InstanceId("p"), (("tcp://h:1",),), num_tokens, SIZE, 1, 1)


def test_a_prefill_is_announced_held_and_freed_once() -> None:
    book = HandoverBook(SIZE)
    a, t = RequestId("a"), TransferId("t")
    book.prefill_started(a, t)
    book.prefill_started(a, t)
    assert book.take_work() == StepWork(announced=[t])
    assert book.prefill_finished(a, [3, 4, 9])
    (hold,) = book.take_work().holds
    assert (hold.transfer_id, hold.request_id, hold.block_ids) == (t, a, (3, 4, 9))
    assert book.counts().num_blocks_held == 3
    assert not book.prefill_finished(a, [3, 4, 9]), "it is held already"
    book.workers_reported([a], [], [])
    assert (book.counts().num_blocks_held, book.counts().holds_total) == (0, 1)
    assert book.take_work() == StepWork()


def test_an_aborted_prefill_is_withdrawn() -> None:
    book = HandoverBook(SIZE)
    book.prefill_started(RequestId("a"), TransferId("t"))
    assert not book.prefill_finished(RequestId("a"), [])
    assert book.take_work() == StepWork(announced=[TransferId("t")], withdrawn=[TransferId("t")])
    assert not book.prefill_finished(RequestId("never started"), [1])
    assert book.counts().num_transfers_held == 0


@pytest.mark.parametrize(
    ("num_prompt", "num_remote", "num_computed", "loadable", "first", "block_ids"),
    [
        (10, 10, 0, 9, 0, (20, 21, 22)),
        (9, 9, 0, 8, 0, (20, 21)),  # The last block holds only the token that is computed again.
        (10, 10, 4, 5, 1, (21, 22)),
        (10, 10, 8, 1, 2, (22,)),
        (10, 8, 0, 8, 0, (20, 21)),  # The peer holds less than the prompt.
        (9, 10, 8, 0, None, None),
        (1, 1, 0, 0, None, None),
    ],
)
def test_which_blocks_are_loaded(
    num_prompt: int,
    num_remote: int,
    num_computed: int,
    loadable: int,
    first: int | None,
    block_ids: tuple[int, ...] | None,
) -> None:
    book = HandoverBook(SIZE)
    source = peer(num_tokens=num_remote)
    assert book.num_loadable(source, num_prompt, num_computed) == loadable
    book.load_started(RequestId("d"), source, [20, 21, 22], num_prompt, loadable)
    work = book.take_work()
    if block_ids is None:
        assert (work.loads, work.releases) == ([], [source]), "the peer learns that nobody comes"
    else:
        (load,) = work.loads
        assert (load.first_block, load.block_ids, load.source) == (first, block_ids, source)
        assert work.releases == []


def test_a_load_of_which_a_block_failed_counts_as_failed_once() -> None:
    book = HandoverBook(SIZE)
    for name in "ab":
        ids = [1, 2, 3] if name == "a" else [4, 5, 6]
        book.load_started(RequestId(name), peer(name), ids, 10, 9)
    assert book.counts().num_loading == 2
    book.workers_reported([], [], [2, 3])  # One worker of several: the load ends when all have ended.
    assert book.counts().loads_failed_total == 0
    book.workers_reported([], [RequestId("a"), RequestId("b")], [])
    counts = book.counts()
    assert (counts.num_loading, counts.loads_total, counts.loads_failed_total) == (0, 2, 1)


def test_a_request_that_ended_early_releases_at_the_peer() -> None:
    book = HandoverBook(SIZE)
    book.load_unused(peer())
    assert book.take_work() == StepWork(releases=[peer()])


def test_parameters_come_back_as_they_were() -> None:
    params = msgspec.to_builtins(peer())
    assert (
        parse_load(msgspec.msgpack.decode(msgspec.msgpack.encode(params)), block_size=SIZE, num_workers=(1, 1))
        == peer()
    )
    assert params["do_remote_prefill"] is True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_size": 8}, "blocks of 8 tokens, this one of 4"),
        ({"tp_size": 2}, r"1 x 2 workers .*, this one on 1 x 1"),
        ({"remote_addresses": []}, "not all named"),
        ({"remote_addresses": [[]]}, "not all named"),
        ({"remote_num_tokens": "ten"}, "not the transfer parameters"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_load({**msgspec.to_builtins(peer()), **change}, block_size=SIZE, num_workers=(1, 1))


def test_a_worker_reports_everything_once_and_failures_no_later_than_their_request() -> None:
    report = WorkerReport()
    report.sent(RequestId("p"))
    report.received(RequestId("d"), [7, 8])
    assert report.take_ended() == ({"p"}, {"d"})
    assert report.take_failed_block_ids() == {7, 8}
    assert (report.take_ended(), report.take_failed_block_ids()) == ((set(), set()), set())


EVENTS = st.lists(
    st.tuples(st.sampled_from(["start", "finish", "abort", "load", "unused", "report"]), st.integers(0, 8))
)


@given(EVENTS, st.randoms(use_true_random=False))
def test_nothing_is_held_or_loading_once_the_workers_have_reported_everything(
    events: list[tuple[str, int]], rng: Any
) -> None:
    """A worker that only knows the work of each step ends with the same books as the scheduler side."""
    book = HandoverBook(SIZE)
    started: set[int] = set()
    used: set[int] = set()
    held: dict[str, str] = {}
    loading: set[str] = set()
    announced: set[str] = set()
    num_releases = num_ended = serial = 0

    def step() -> None:
        nonlocal num_releases
        work = book.take_work()
        announced.update(work.announced)
        for transfer_id in work.withdrawn:
            announced.remove(transfer_id)
        for hold in work.holds:
            announced.remove(hold.transfer_id)
            assert hold.request_id not in held
            held[hold.request_id] = hold.transfer_id
        for load in work.loads:
            assert load.request_id not in loading
            loading.add(load.request_id)
        num_releases += len(work.releases)

    for kind, number in events:
        prefill = RequestId(f"p{number}")
        match kind:
            case "start" if number not in used:
                used.add(number)
                book.prefill_started(prefill, TransferId(f"t{number}"))
                started.add(number)
            case "finish" | "abort":
                blocks = [1] * (number + 1) if kind == "finish" else []
                assert book.prefill_finished(prefill, blocks) == (number in started and kind == "finish")
                started.discard(number)
            case "load":
                serial += 1
                external = rng.choice([0, 5])
                book.load_started(RequestId(f"d{serial}"), peer(), [serial] * 3, 10, external)
                num_ended += not external
            case "unused":
                book.load_unused(peer())
                num_ended += 1
            case _:
                step()
                sent = rng.sample(sorted(held), rng.randint(0, len(held)))
                received = rng.sample(sorted(loading), rng.randint(0, len(loading)))
                book.workers_reported(map(RequestId, sent), map(RequestId, received), [])
                for name in sent:
                    del held[name]
                loading.difference_update(received)
    step()
    counts = book.counts()
    assert (counts.num_transfers_held, counts.num_loading) == (len(held), len(loading))
    assert (len(announced), num_releases) == (len(started), num_ended)
    book.workers_reported(map(RequestId, held), map(RequestId, loading), [])
    counts = book.counts()
    assert (counts.num_transfers_held, counts.num_blocks_held, counts.num_loading) == (0, 0, 0)
