"""What a watcher keeps when its server comes back without its state."""

from stator.core.key_store import KeyValue, WatchBatch
from stator.core.key_view import KeyView
from stator.ids import LeaseId

GRACE_S = 12.0


def kv(key: str, value: bytes = b"x", lease: int | None = 1) -> KeyValue:
    return KeyValue(key, value, 1, None if lease is None else LeaseId(lease))


def whole(*entries: KeyValue) -> WatchBatch:
    return WatchBatch(puts=list(entries), reset=True)


def keys(batch: WatchBatch) -> list[str]:
    assert batch.reset
    return [entry.key for entry in batch.puts]


def test_a_whole_state_of_the_same_epoch_replaces_the_view() -> None:
    view = KeyView(GRACE_S)
    assert keys(view.receive(whole(kv("a"), kv("b")), 1, 0.0)) == ["a", "b"]
    assert keys(view.receive(whole(kv("b")), 1, 1.0)) == ["b"]
    assert view.next_deadline is None


def test_another_epoch_keeps_what_leases_held_for_the_grace() -> None:
    view = KeyView(GRACE_S)
    view.receive(whole(kv("a"), kv("b"), kv("plain", lease=None)), 1, 0.0)
    assert keys(view.receive(whole(kv("c")), 2, 100.0)) == ["a", "b", "c"]
    assert view.next_deadline == 112.0
    put_again = WatchBatch(puts=[kv("b")])
    assert view.receive(put_again, 2, 101.0) is put_again
    assert view.tick(111.9) is None
    assert view.tick(112.0) == WatchBatch(deletes=["a"])
    assert view.next_deadline is None
    assert view.tick(113.0) is None


def test_what_changed_meanwhile_is_the_new_value() -> None:
    view = KeyView(GRACE_S)
    view.receive(whole(kv("a", b"old")), 1, 0.0)
    assert view.receive(whole(kv("a", b"new")), 2, 1.0).puts == [kv("a", b"new")]
    assert view.next_deadline is None


def test_a_key_that_was_put_again_and_deleted_is_gone() -> None:
    view = KeyView(GRACE_S)
    view.receive(whole(kv("a"), kv("b")), 1, 0.0)
    view.receive(whole(), 2, 1.0)
    view.receive(WatchBatch(puts=[kv("a")]), 2, 2.0)
    view.receive(WatchBatch(deletes=["a"]), 2, 3.0)
    assert view.tick(13.0) == WatchBatch(deletes=["b"])


def test_a_lost_connection_during_the_grace_changes_nothing_about_it() -> None:
    view = KeyView(GRACE_S)
    view.receive(whole(kv("a"), kv("b")), 1, 0.0)
    view.receive(whole(kv("a")), 2, 1.0)
    # "a" had been put again and is missing now: its lease ended at the new server.
    assert keys(view.receive(whole(), 2, 5.0)) == ["b"]
    assert view.next_deadline == 13.0


def test_yet_another_epoch_starts_the_grace_anew() -> None:
    view = KeyView(GRACE_S)
    view.receive(whole(kv("a"), kv("b")), 1, 0.0)
    view.receive(whole(kv("a")), 2, 1.0)
    assert keys(view.receive(whole(), 3, 6.0)) == ["a", "b"]
    assert view.next_deadline == 18.0


def test_a_server_that_tells_no_epoch_is_always_the_same() -> None:
    view = KeyView(GRACE_S)
    view.receive(whole(kv("a")), 0, 0.0)
    assert keys(view.receive(whole(), 0, 1.0)) == []
