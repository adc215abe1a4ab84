from stator.messages.engine import EngineLoad
from stator.messages.instances import InstanceInfo
from stator.messages.reports import WorkerReport
from stator.observability.copies import render_together, snapshot_of
from stator.observability.metrics import Metrics


def counted(times: int) -> Metrics:
    metrics = Metrics(clock=lambda: 0.0)
    metrics.counter("requests_total", "m", "chat", "200").inc(times)
    metrics.gauge("requests_in_progress", "chat").set(times)
    metrics.histogram("time_to_first_token_seconds", "m", "chat").observe(0.1 * times)
    metrics.histogram("inter_token_latency_seconds", "m", "chat").observe(0.01, times)
    return metrics


def test_every_series_of_the_frontend_says_of_which_process_it_is() -> None:
    own = counted(1)
    worker = InstanceInfo("W-1", "W", "decode", (), (), "h", 1)  # type: ignore[arg-type]
    own.workers.update(worker, WorkerReport(EngineLoad()))
    snapshots = {1: snapshot_of(own, 1), 2: snapshot_of(counted(3), 2), 3: None}
    lines = render_together(own, snapshots).decode().splitlines()
    for name, labels in (
        ("requests_total", 'code="200",endpoint="chat",model="m"'),
        ("requests_in_progress", 'endpoint="chat"'),
        ("inter_token_latency_seconds_count", 'endpoint="chat",model="m"'),
    ):
        assert f'stator_{name}{{{labels},process="1"}} 1.0' in lines
        assert f'stator_{name}{{{labels},process="2"}} 3.0' in lines
    assert 'stator_time_to_first_token_seconds_bucket{endpoint="chat",le="+Inf",model="m",process="2"} 1.0' in lines
    assert [line for line in lines if "process_up{" in line] == [
        f'stator_frontend_process_up{{process="{process}"}} {up}' for process, up in ((1, 1.0), (2, 1.0), (3, 0.0))
    ]
    blocks = [line for line in lines if line.startswith("stator_worker_kv_blocks{")]
    assert len(blocks) == 1 and "process" not in blocks[0]
    types = [line for line in lines if line.startswith("# TYPE")]
    assert len(types) == len(set(types))
