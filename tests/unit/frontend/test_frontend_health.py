import msgspec

from stator.frontend.health import HealthReport, ModelHealth, PairingRefusal, health_of, models_of
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.instances import InstanceInfo, InstanceState
from stator.messages.lora import LoraAdapter
from stator.messages.openai import ModelCard


def instance(role: str, model: str | None = "m", state: InstanceState = InstanceState.READY, length: int = 0):
    engine = EngineInfo("local", "1", "m", 64, 10, 4, 512, length) if length else None
    return InstanceInfo(InstanceId("i"), "S", role, (), (), "h", 1, state, model, engine)


def test_ready_with_a_decode_worker():
    workers = [instance("decode"), instance("prefill"), instance("prefill"), instance("router", None)]
    assert health_of(workers, ("router",)) == HealthReport(True, [], {"m": ModelHealth(1, 2)})


def test_reasons():
    assert health_of([]).reasons == ["no worker is ready"]
    only_prefill = health_of([instance("prefill")])
    assert (only_prefill.ready, only_prefill.reasons) == (False, ["no decode worker of model m is ready"])
    draining = health_of([instance("decode", state=InstanceState.DRAINING)])
    assert (draining.ready, draining.reasons) == (False, ["no worker is ready"])
    unrouted = health_of([instance("decode")], ("router",))
    assert (unrouted.ready, unrouted.reasons) == (False, ["no router instance is ready"])


def test_one_of_two_models_is_enough():
    report = health_of([instance("decode", "a"), instance("prefill", "b")])
    assert report.ready
    assert report.reasons == ["no decode worker of model b is ready"]


def paired(name: str, role: str, state: InstanceState = InstanceState.READY, **pairing: str):
    engine = EngineInfo("local", "1", "m", 64, 10, 4, 512, 99, pairing)
    return InstanceInfo(InstanceId(name), "S", role, (), (), "h", 1, state, "m", engine)


def test_refused_prefill_instances_are_named_and_do_not_make_it_unready():
    fits, other = {"block_size": "64", "connector": "c"}, {"block_size": "32"}
    workers = [
        paired("d1", "decode", **fits),
        paired("d2", "decode", **fits),
        paired("p1", "prefill", **other),
        paired("p2", "prefill", **fits),
        paired("p3", "prefill", **other),
        paired("leaving", "prefill", InstanceState.DRAINING, block_size="16"),
        instance("prefill"),
    ]
    report = health_of(workers)
    assert report.ready
    assert report.reasons == []
    words = [
        "block_size is 64 for decode and 32 for prefill",
        "connector is c for decode and not given for prefill",
    ]
    assert report.pairing_refusals == [
        PairingRefusal([InstanceId("d1"), InstanceId("d2")], [InstanceId("p1"), InstanceId("p3")], words)
    ]
    assert health_of([w for w in workers if w.instance_id not in ("p1", "p3")]).pairing_refusals == []


def test_refusals_are_as_many_as_kinds_of_engines():
    decode = [paired(f"d{n}", "decode", block_size=str(n % 2)) for n in range(100)]
    prefill = [paired(f"p{n}", "prefill", block_size=str(n % 2)) for n in range(100)]
    assert len(health_of([*decode, *prefill]).pairing_refusals) == 2


def test_engines_of_two_models_are_not_expected_to_pair():
    other = msgspec.structs.replace(paired("p", "prefill", model="other"), model="other")
    assert health_of([paired("d", "decode", model="m"), other]).pairing_refusals == []


def test_adapters_are_models_with_a_parent() -> None:
    def having(model: str, *names: str, role: str = "decode", length: int = 0) -> InstanceInfo:
        adapters = tuple(LoraAdapter(name, "/x") for name in names)
        return msgspec.structs.replace(instance(role, model, length=length), adapters=adapters)

    workers = [
        having("a", "odd", "b", length=50),
        having("a", "odd", length=80),
        having("b"),
        having("a", "p", role="prefill"),
    ]
    # A model comes before an adapter of its name; what only prefill workers have cannot be finished.
    assert models_of(workers, 5) == [
        ModelCard("a", 5, 50), ModelCard("b", 5, None), ModelCard("odd", 5, 50, parent="a"),
    ]  # fmt: skip


def test_models_are_named_once_with_the_shortest_context():
    workers = [instance("decode", "b"), instance("decode", "a", length=100), instance("decode", "a", length=50)]
    assert models_of([*workers, instance("prefill", "c")], 5) == [ModelCard("a", 5, 50), ModelCard("b", 5, None)]
