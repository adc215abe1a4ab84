"""A watch over lost connections and compaction, against the history of a store as the model."""

from hypothesis import given
from hypothesis import strategies as st

from stator.core.etcd_watch import Entry, Event, EventType, Header, Next, WatchCursor, WatchResponse
from stator.core.key_store import KeyValue, WatchBatch
from stator.ids import LeaseId

PREFIX = b"/stator/ns/"


def put(revision: int, key: str = "a", value: bytes = b"v", lease: int = 0) -> Event:
    return Event(Entry(PREFIX + key.encode(), value, revision, lease=lease))


def deletion(revision: int, key: str = "a") -> Event:
    return Event(Entry(PREFIX + key.encode(), mod_revision=revision), EventType.DELETE)


def cursor_at(revision: int) -> WatchCursor:
    cursor = WatchCursor(len(PREFIX))
    cursor.state_read(revision)
    return cursor


def test_the_whole_state_comes_first() -> None:
    cursor = WatchCursor(len(PREFIX))
    assert cursor.start_revision is None
    cursor.state_read(7)
    assert cursor.start_revision == 8


def test_one_revision_is_one_batch() -> None:
    cursor = cursor_at(3)
    response = WatchResponse(events=(put(4, lease=9), deletion(5, "x"), deletion(5, "y"), put(6, "b")))
    batches, then = cursor.receive(response)
    assert then is Next.GO_ON
    assert batches == [
        WatchBatch(puts=[KeyValue("a", b"v", 4, LeaseId(9))]),
        WatchBatch(deletes=["x", "y"]),
        WatchBatch(puts=[KeyValue("b", b"v", 6)]),
    ]
    assert cursor.start_revision == 7


def test_what_was_told_is_not_told_again() -> None:
    cursor = cursor_at(3)
    cursor.receive(WatchResponse(events=(put(4), put(5))))
    batches, _ = cursor.receive(WatchResponse(events=(put(4), put(5), put(6, value=b"new"))))
    assert [batch.puts[0].revision for batch in batches] == [6]


def test_only_progress_moves_the_revision_without_a_change() -> None:
    cursor = cursor_at(3)
    # Changes after 3 may still come: the watch was only made at 50.
    cursor.receive(WatchResponse(Header(revision=50), created=True))
    assert cursor.start_revision == 4
    cursor.receive(WatchResponse(Header(revision=60)))
    assert cursor.start_revision == 61
    # A member that is behind does not move it back.
    cursor.receive(WatchResponse(Header(revision=10)))
    assert cursor.start_revision == 61


def test_a_compacted_revision_needs_the_whole_state() -> None:
    cursor = cursor_at(3)
    batches, then = cursor.receive(WatchResponse(Header(revision=90), canceled=True, compact_revision=80))
    assert (batches, then) == ([], Next.READ_STATE)
    assert cursor.start_revision is None


def test_a_cancelled_watch_is_tried_again_where_it_was() -> None:
    cursor = cursor_at(3)
    batches, then = cursor.receive(WatchResponse(events=(put(4),), canceled=True, cancel_reason="no leader"))
    assert len(batches) == 1
    assert then is Next.TRY_AGAIN
    assert cursor.start_revision == 5


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30),
    st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 3)), max_size=40),
)
def test_any_series_of_connections_tells_every_change_once(
    history: list[tuple[str, bool]], connections: list[tuple[int, bool, int]]
) -> None:
    """connections: how many changes it carries, whether it is broken off then, how many it repeats from before."""
    events = [put(2 + n, key) if kept else deletion(2 + n, key) for n, (key, kept) in enumerate(history)]
    cursor = cursor_at(1)
    told: list[int] = []
    for carries, compacted, repeats in connections:
        start = cursor.start_revision
        assert start is not None
        sent = [e for e in events if e.kv.mod_revision >= start - repeats][: carries + repeats]
        batches, _ = cursor.receive(WatchResponse(events=tuple(sent)))
        for batch in batches:
            told += [entry.revision for entry in batch.puts] or [-1] * len(batch.deletes)
        if compacted and not sent:
            cursor.receive(WatchResponse(canceled=True, compact_revision=99))
            cursor.state_read(1 + len(events))
    expected = [e.kv.mod_revision if e.type is EventType.PUT else -1 for e in events]
    assert told == expected[: len(told)]
