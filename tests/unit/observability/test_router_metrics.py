from prometheus_client.parser import text_string_to_metric_families

from stator.ids import InstanceId
from stator.messages.engine import EngineLoad
from stator.messages.instances import InstanceInfo
from stator.messages.reports import DECISION_S, DIFFERENCE_BLOCKS, WAIT_S, IndexStats, RouterStats, WorkerReport
from stator.observability.metrics import Metrics

ROUTER = InstanceInfo(
    instance_id=InstanceId("r1"), service="Router", role="router", addresses=(), endpoints=(), host="h", pid=1
)
STATS = RouterStats(
    decisions={"kv": 7},
    predictions={"exact": {"events": 5}, "over": {"booked": 1}},
    difference_counts=[5, 0, 1] + [0] * (len(DIFFERENCE_BLOCKS) - 2),
    difference_sum=2.0,
    decision_counts=[7] + [0] * len(DECISION_S),
    decision_sum_s=1e-5,
    num_bookings=3,
    num_waiting=2,
    num_waiting_tokens=900,
    wait_counts=[6, 1] + [0] * (len(WAIT_S) - 1),
    wait_sum_s=0.005,
    refusals={"queue_full": 4, "a newer reason": 1},
    index=IndexStats(num_entries=100, num_bytes=9000, num_workers=4, num_settled=3, gaps_total=1),
)


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            rest = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "router")
            found[sample.name, rest] = sample.value
    return found


def test_a_routers_report_becomes_its_metrics_and_no_workers() -> None:
    metrics = Metrics(clock=lambda: 0.0)
    metrics.workers.update(ROUTER, WorkerReport(EngineLoad(), router=STATS))
    found = samples(metrics)
    assert found["stator_route_decisions_total", "mode=kv"] == 7
    assert found["stator_router_overlap_predictions_total", "basis=events,outcome=exact"] == 5
    assert found["stator_router_overlap_predictions_total", "basis=booked,outcome=over"] == 1
    assert found["stator_router_overlap_difference_blocks_count", ""] == 6
    assert found["stator_router_overlap_difference_blocks_sum", ""] == 2
    assert found["stator_route_decision_seconds_count", ""] == 7
    assert found["stator_router_index_blocks", ""] == 100
    assert found["stator_router_index_gaps_total", ""] == 1
    assert found["stator_router_bookings", ""] == 3
    assert found["stator_router_waiting_requests", ""] == 2
    assert found["stator_router_waiting_tokens", ""] == 900
    assert found["stator_router_wait_seconds_count", ""] == 7
    assert found["stator_router_refusals_total", "reason=queue_full"] == 4
    assert found["stator_router_refusals_total", "reason=other"] == 1
    assert not any(name == "stator_worker_running_requests" for name, _ in found)
    metrics.workers.remove(ROUTER.instance_id)
    assert ("stator_router_bookings", "") not in samples(metrics)


def test_counts_that_do_not_fit_the_buckets_are_left_out() -> None:
    metrics = Metrics(clock=lambda: 0.0)
    metrics.workers.update(ROUTER, WorkerReport(EngineLoad(), router=RouterStats(decision_counts=[1, 2])))
    assert ("stator_route_decision_seconds_count", "") not in samples(metrics)
