import pytest
from prometheus_client.parser import text_string_to_metric_families

from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.instances import InstanceInfo
from stator.messages.reports import WorkerReport
from stator.observability.metrics import FRONTEND_METRICS, WORKER_METRICS, Kind, Metrics

W1 = InstanceInfo(
    instance_id=InstanceId("w1"), service="VllmWorker", role="decode", addresses=(), endpoints=(), host="h", pid=1
)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    return None


class Clock:
    """Seconds, set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def report(load: EngineLoad, waiting: int = 0, **prefills: int) -> WorkerReport:
    return WorkerReport(load=load, prefills=prefills, queue_waiting=waiting)


def test_names_are_declared_once_and_say_what_they_count():
    specs = FRONTEND_METRICS + WORKER_METRICS
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER), spec.name
        assert spec.help.endswith("."), spec.name


def test_two_registries_share_nothing():
    one, two = Metrics(), Metrics()
    one.counter("rejected_total", "overloaded").inc()
    assert sample(one, "stator_rejected_total", reason="overloaded") == 1
    assert sample(two, "stator_rejected_total", reason="overloaded") is None


def test_children_are_cached():
    metrics = Metrics()
    assert metrics.counter("rejected_total", "a") is metrics.counter("rejected_total", "a")
    assert metrics.gauge("requests_in_progress", "chat") is metrics.gauge("requests_in_progress", "chat")
    assert metrics.histogram("request_input_tokens", "m", "chat") is metrics.histogram(
        "request_input_tokens", "m", "chat"
    )


def test_a_histogram_counts_many_at_once():
    metrics = Metrics()
    latency = metrics.histogram("inter_token_latency_seconds", "m", "chat")
    for _ in range(2):
        latency.observe(0.01, 3)
        latency.observe(99.0)
    with pytest.raises(ValueError, match="labels"):
        metrics.histogram("inter_token_latency_seconds", "m")
    name = "stator_inter_token_latency_seconds"
    assert sample(metrics, f"{name}_bucket", le="0.005") == 0
    assert sample(metrics, f"{name}_bucket", le="0.01") == 6
    assert sample(metrics, f"{name}_bucket", le="10.0") == 6
    assert sample(metrics, f"{name}_bucket", le="+Inf") == 8
    assert sample(metrics, f"{name}_count", model="m") == 8
    assert sample(metrics, f"{name}_sum", model="m") == 198.06


def test_worker_figures():
    clock = Clock()
    metrics = Metrics(clock)
    metrics.workers.update(W1, report(EngineLoad(num_blocks=10)))
    after = EngineLoad(
        num_running=4,
        num_waiting=1,
        num_blocks=10,
        num_blocks_used=5,
        num_blocks_held=2,
        prompt_tokens_total=80,
        prompt_tokens_cached_total=60,
        prompt_tokens_computed_total=20,
        prompt_tokens_transferred_total=7,
        generation_tokens_total=40,
        preemptions_total=1,
    )
    clock.now = 2.0
    metrics.workers.update(W1, report(after, waiting=6, remote=2, fallback=1, nonsense=5))
    expected = {
        "running_requests": 4,
        "waiting_requests": 1,
        "kv_blocks": 10,
        "kv_blocks_used": 5,
        "kv_blocks_held": 2,
        "kv_usage_ratio": 0.5,
        "prompt_tokens_total": 80,
        "prompt_tokens_cached_total": 60,
        "prompt_tokens_computed_total": 20,
        "prompt_tokens_transferred_total": 7,
        "generation_tokens_total": 40,
        "preemptions_total": 1,
        "prompt_throughput_tokens_per_second": 10,
        "generation_throughput_tokens_per_second": 20,
        "prefix_hit_ratio": 0.75,
    }
    labels = {"worker": "w1", "service": "VllmWorker", "role": "decode", "host": "h"}
    assert {name: sample(metrics, f"stator_worker_{name}", **labels) for name in expected} == expected
    assert sample(metrics, "stator_remote_prefill_total", outcome="remote", **labels) == 2
    assert sample(metrics, "stator_remote_prefill_total", outcome="fallback", **labels) == 1
    assert sample(metrics, "stator_remote_prefill_total", outcome="other", **labels) == 5
    assert sample(metrics, "stator_prefill_queue_size") == 6
    kinds = {family.name: family.type for family in text_string_to_metric_families(metrics.render().decode())}
    assert kinds["stator_worker_generation_tokens"] == "counter"
    assert kinds["stator_worker_kv_blocks"] == "gauge"


def test_prefill_instances_by_pairing():
    metrics = Metrics(Clock())
    name = "stator_worker_prefill_instances"
    metrics.workers.update(W1, report(EngineLoad(), refused=4))
    assert sample(metrics, name) is None, "a worker that uses none has no such series"
    assert sample(metrics, "stator_remote_prefill_total", outcome="refused") == 4
    seen = {"paired": 2, "refused": 0, "invented": 3}
    metrics.workers.update(W1, WorkerReport(EngineLoad(), prefill_instances=seen))
    assert sample(metrics, name, worker="w1", pairing="paired") == 2
    assert sample(metrics, name, worker="w1", pairing="refused") == 0
    assert sample(metrics, name, pairing="other") == 3
    kinds = {family.name: family.type for family in text_string_to_metric_families(metrics.render().decode())}
    assert kinds[name] == "gauge"


def test_throughput_is_of_the_last_seconds_only():
    clock = Clock()
    metrics = Metrics(clock)
    for second in range(20):
        clock.now = float(second)
        metrics.workers.update(W1, report(EngineLoad(generation_tokens_total=1000 * min(second, 10))))
    assert sample(metrics, "stator_worker_generation_throughput_tokens_per_second") == 0


def test_a_worker_that_left_takes_its_series_along():
    metrics = Metrics(Clock())
    metrics.workers.update(W1, report(EngineLoad()))
    metrics.workers.remove(W1.instance_id)
    metrics.workers.remove(W1.instance_id)
    assert sample(metrics, "stator_worker_kv_blocks") is None
