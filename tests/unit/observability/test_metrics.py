from prometheus_client.parser import text_string_to_metric_families

from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.observability.metrics import FRONTEND_METRICS, WORKER_METRICS, Kind, Metrics

W1 = InstanceId("w1")


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(metrics.render().decode()):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    return None


def update(metrics: Metrics, load: EngineLoad, at: float, **prefills: int) -> None:
    metrics.workers.update(W1, service="VllmWorker", role="decode", host="h", load=load, at=at, prefills=prefills)


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
    assert metrics.gauge("prefill_queue_size") is metrics.gauge("prefill_queue_size")
    assert metrics.histogram("request_input_tokens", "m", "chat") is metrics.histogram(
        "request_input_tokens", "m", "chat"
    )


def test_tallied_histogram_adds_up_streams():
    metrics = Metrics()
    latency = metrics.tallied("inter_token_latency_seconds")
    for _ in range(2):
        tally = latency.tally()
        tally.observe(0.01, 3)
        tally.observe(99.0, 1)
        latency.add(("m", "chat"), tally)
    name = "stator_inter_token_latency_seconds"
    assert sample(metrics, f"{name}_bucket", le="0.005") == 0
    assert sample(metrics, f"{name}_bucket", le="0.01") == 6
    assert sample(metrics, f"{name}_bucket", le="10.0") == 6
    assert sample(metrics, f"{name}_bucket", le="+Inf") == 8
    assert sample(metrics, f"{name}_count", model="m") == 8
    assert sample(metrics, f"{name}_sum", model="m") == 198.06


def test_worker_figures():
    metrics = Metrics()
    update(metrics, EngineLoad(num_blocks=10), at=100.0)
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
    update(metrics, after, at=102.0, remote=2, fallback=1, nonsense=5)
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
    kinds = {family.name: family.type for family in text_string_to_metric_families(metrics.render().decode())}
    assert kinds["stator_worker_generation_tokens"] == "counter"
    assert kinds["stator_worker_kv_blocks"] == "gauge"


def test_throughput_is_of_the_last_seconds_only():
    metrics = Metrics()
    for second in range(20):
        update(metrics, EngineLoad(generation_tokens_total=1000 * min(second, 10)), at=float(second))
    assert sample(metrics, "stator_worker_generation_throughput_tokens_per_second") == 0


def test_a_worker_that_left_takes_its_series_along():
    metrics = Metrics()
    update(metrics, EngineLoad(), at=0.0)
    metrics.workers.remove(W1)
    metrics.workers.remove(W1)
    assert sample(metrics, "stator_worker_kv_blocks") is None
