from stator.frontend.health import HealthReport, ModelHealth, health_of, models_of
from stator.ids import InstanceId
from stator.messages.engine import EngineInfo
from stator.messages.instances import InstanceInfo, InstanceState
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


def test_models_are_named_once_with_the_shortest_context():
    workers = [instance("decode", "b"), instance("decode", "a", length=100), instance("decode", "a", length=50)]
    assert models_of([*workers, instance("prefill", "c")], 5) == [ModelCard("a", 5, 50), ModelCard("b", 5, None)]
