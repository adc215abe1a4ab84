import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stator.core.key_store import (
    Answer,
    Delete,
    Effect,
    Event,
    Found,
    Get,
    GetPrefix,
    GrantLease,
    KeyStore,
    KeyStoreLimits,
    LeaseEnded,
    Notify,
    Put,
    Refused,
    RenewLease,
    RevokeLease,
    Tick,
    Unwatch,
    Watch,
    WatchBatch,
)
from stator.errors import ErrorCode
from stator.ids import LeaseId

ONE, TWO = LeaseId(1), LeaseId(2)


def only(effects: list[Effect]) -> Effect:
    (effect,) = effects
    return effect


def value_of(store: KeyStore, key: str, now: float) -> bytes | None:
    found = only(store.handle(Get(key), now))
    assert isinstance(found, Found)
    return found.entries[0].value if found.entries else None


def test_a_lease_ends_its_ttl_after_the_last_renewal() -> None:
    store = KeyStore()
    store.handle(GrantLease(ONE, 10.0), 0.0)
    store.handle(Put("k", b"v", ONE), 1.0)
    assert store.next_deadline == 10.0
    assert store.handle(RenewLease(ONE), 9.0) == [Answer(True)]
    assert store.handle(Tick(), 18.9) == []
    assert store.has_lease(ONE, 18.9)
    assert not store.has_lease(ONE, 19.0)
    assert store.handle(Tick(), 19.0) == [LeaseEnded(ONE, expired=True)]
    assert value_of(store, "k", 19.0) is None
    assert store.next_deadline is None
    assert store.handle(RenewLease(ONE), 19.0) == [Answer(False)]


def test_nothing_succeeds_under_a_lease_whose_time_has_passed() -> None:
    """Even when nobody sent the Tick that was due."""
    store = KeyStore()
    store.handle(GrantLease(ONE, 10.0), 0.0)
    ended, refused = store.handle(Put("k", b"v", ONE), 10.0)
    assert ended == LeaseEnded(ONE, expired=True)
    assert isinstance(refused, Refused)
    assert refused.code is ErrorCode.NOT_FOUND
    assert store.handle(RevokeLease(ONE), 10.0) == [Answer(False)]


def test_an_ended_lease_takes_its_keys_in_one_change() -> None:
    store = KeyStore()
    store.handle(GrantLease(ONE, 10.0), 0.0)
    for key in ("p/b", "p/a", "q/c"):
        store.handle(Put(key, b"v", ONE), 0.0)
    store.handle(Watch(7, "p/"), 0.0)
    assert store.handle(RevokeLease(ONE), 0.0) == [
        Answer(True),
        LeaseEnded(ONE, expired=False),
        Notify(7, WatchBatch(deletes=["p/a", "p/b"])),
    ]


def test_a_key_belongs_to_the_lease_of_its_last_put() -> None:
    store = KeyStore()
    for event in (GrantLease(ONE, 10.0), GrantLease(TWO, 10.0), Put("k", b"1", ONE), Put("k", b"2", TWO)):
        store.handle(event, 0.0)
    assert store.handle(RevokeLease(ONE), 0.0) == [Answer(True), LeaseEnded(ONE, expired=False)]
    assert value_of(store, "k", 0.0) == b"2"
    store.handle(RevokeLease(TWO), 0.0)
    assert value_of(store, "k", 0.0) is None


def test_watching_again_starts_over() -> None:
    store = KeyStore()
    store.handle(Watch(1, "k"), 0.0)
    store.handle(Put("k1", b"v"), 0.0)
    answer, notify = store.handle(Watch(1, "k"), 0.0)
    assert answer == Answer(True)
    assert isinstance(notify, Notify)
    assert notify.batch.reset
    assert [entry.key for entry in notify.batch.puts] == ["k1"]
    assert store.handle(Unwatch(1), 0.0) == [Answer(True)]
    assert store.handle(Put("k2", b"v"), 0.0) == [Answer(2)]


def test_create_leaves_a_present_key_alone() -> None:
    store = KeyStore(first_revision=5)
    assert store.handle(Put("k", b"a", only_if_absent=True), 0.0) == [Answer(5)]
    assert store.handle(Put("k", b"b", only_if_absent=True), 0.0) == [Answer(0)]
    assert value_of(store, "k", 0.0) == b"a"


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Put("new", b"v"), ErrorCode.OVERLOADED),
        (Put("k0", b"12345"), ErrorCode.INVALID_REQUEST),
        (Put("", b"v"), ErrorCode.INVALID_REQUEST),
        (Put("a-long-key", b"v"), ErrorCode.INVALID_REQUEST),
        (GrantLease(LeaseId(9), 1.0), ErrorCode.OVERLOADED),
        (GrantLease(ONE, 1.0), ErrorCode.INVALID_REQUEST),
        (GrantLease(LeaseId(9), 1e9), ErrorCode.INVALID_REQUEST),
        (GrantLease(LeaseId(9), float("nan")), ErrorCode.INVALID_REQUEST),
        (Watch(9, ""), ErrorCode.OVERLOADED),
    ],
)
def test_what_would_pass_a_bound_is_refused(event: Event, code: ErrorCode) -> None:
    store = KeyStore(KeyStoreLimits(max_keys=2, max_key_bytes=8, max_value_bytes=4, max_leases=2, max_watches=1))
    for setup in (Put("k0", b"v"), Put("k1", b"v"), GrantLease(ONE, 10.0), GrantLease(TWO, 10.0), Watch(1, "")):
        store.handle(setup, 0.0)
    refused = only(store.handle(event, 0.0))
    assert isinstance(refused, Refused)
    assert refused.code is code
    assert store.handle(Put("k0", b"ok"), 0.0)[0] == Answer(3)


KEYS = st.sampled_from(["a/1", "a/2", "b/1"])
LEASES = st.sampled_from([LeaseId(number) for number in range(1, 3)])
TTL_S = 10.0


class KeyStoreMachine(RuleBasedStateMachine):
    """Against two dictionaries: what is kept, and until when each lease lives."""

    @initialize()
    def start(self) -> None:
        self.store = KeyStore()
        self.now = 0.0
        self.kept: dict[str, tuple[bytes, LeaseId | None]] = {}
        self.until: dict[LeaseId, float] = {}
        self.views: dict[int, dict[str, bytes]] = {}
        self.last_revision = 0
        for watch_id, prefix in ((1, "a/"), (2, "")):
            self.apply(Watch(watch_id, prefix))
        self.grant_all()

    def grant_all(self) -> None:
        for lease_id in (ONE, TWO):
            self.apply(GrantLease(lease_id, TTL_S))
            self.until[lease_id] = self.now + TTL_S

    def apply(self, event: Event) -> Effect | None:
        for lease_id in [lease_id for lease_id, until in self.until.items() if until <= self.now]:
            self.end(lease_id)
        answer: Effect | None = None
        revisions: set[int] = set()
        for effect in self.store.handle(event, self.now):
            if isinstance(effect, Notify):
                view = {} if effect.batch.reset else self.views[effect.watch_id]
                for key in effect.batch.deletes:
                    del view[key]
                for entry in effect.batch.puts:
                    view[entry.key] = entry.value
                    revisions.add(entry.revision)
                self.views[effect.watch_id] = view
            elif not isinstance(effect, LeaseEnded):
                assert answer is None
                answer = effect
        if not isinstance(event, Watch):
            assert all(revision > self.last_revision for revision in revisions)
        self.last_revision = max(revisions, default=self.last_revision)
        return answer

    def end(self, lease_id: LeaseId) -> None:
        del self.until[lease_id]
        self.kept = {key: kept for key, kept in self.kept.items() if kept[1] != lease_id}

    @rule(lease_id=LEASES)
    def grant(self, lease_id: LeaseId) -> None:
        answer = self.apply(GrantLease(lease_id, TTL_S))
        assert isinstance(answer, Refused if lease_id in self.until else Answer)
        self.until.setdefault(lease_id, self.now + TTL_S)

    @rule(lease_id=LEASES)
    def renew(self, lease_id: LeaseId) -> None:
        answer = self.apply(RenewLease(lease_id))
        assert answer == Answer(lease_id in self.until)
        if lease_id in self.until:
            self.until[lease_id] = self.now + TTL_S

    @rule(lease_id=LEASES)
    def revoke(self, lease_id: LeaseId) -> None:
        answer = self.apply(RevokeLease(lease_id))
        assert answer == Answer(lease_id in self.until)
        if lease_id in self.until:
            self.end(lease_id)

    @rule(key=KEYS, value=st.binary(max_size=2), lease_id=st.none() | LEASES, only_if_absent=st.booleans())
    def put(self, key: str, value: bytes, lease_id: LeaseId | None, only_if_absent: bool) -> None:
        answer = self.apply(Put(key, value, lease_id, only_if_absent))
        if lease_id is not None and lease_id not in self.until:
            assert isinstance(answer, Refused)
        elif only_if_absent and key in self.kept:
            assert answer == Answer(0)
        else:
            assert isinstance(answer, Answer)
            assert answer.value > 0
            self.kept[key] = (value, lease_id)

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        answer = self.apply(Delete(key))
        assert answer == Answer(key in self.kept)
        self.kept.pop(key, None)

    @rule(seconds=st.sampled_from([0.5, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.apply(Tick())

    @precondition(lambda self: self.store.next_deadline is not None)
    @rule()
    def wait_for_the_deadline(self) -> None:
        deadline = self.store.next_deadline
        assert deadline is not None
        assert deadline <= min(self.until.values())
        self.now = max(self.now, deadline)
        self.apply(Tick())

    @invariant()
    def the_store_is_the_model(self) -> None:
        found = self.apply(GetPrefix(""))
        assert isinstance(found, Found)
        assert [entry.key for entry in found.entries] == sorted(self.kept)
        assert {entry.key: (entry.value, entry.lease_id) for entry in found.entries} == self.kept
        values = {key: value for key, (value, _) in self.kept.items()}
        assert self.views[2] == values
        assert self.views[1] == {key: value for key, value in values.items() if key.startswith("a/")}


TestKeyStoreMachine = KeyStoreMachine.TestCase
TestKeyStoreMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
