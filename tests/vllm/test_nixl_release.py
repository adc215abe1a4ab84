"""A NixlConnector hold that nobody will fetch ends when it is told to, long before its lease."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import stator
from stator.engines.vllm.connectors import NIXL_CONNECTOR, TransferPlane, plan_connector
from stator.engines.vllm.transfer import prefill_params, release, result_transfer
from stator.ids import InstanceId, TransferId
from stator.testing.contracts.engine_suite import make_request
from stator.transport import Identity, RequestPlaneClient
from vllm_engines.engine_process import engine_processes

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

LEASE_S = 60.0


def test_a_released_hold_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = TransferPlane("n", InstanceId("e"), tmp_path / "unused", hold_s=LEASE_S)
    plan = plan_connector({"kv_connector": "DynamoNixlConnector"}, plane, gpu=False, environment={})
    for name, value in plan.environment.items():
        monkeypatch.setenv(name, value)
    ids = list(range(400, 600))
    with engine_processes(1, tmp_path) as (engine,):
        engine.start(
            model=str(Path(stator.__file__).parent / "models" / "tiny-llama"),
            dtype="float32",
            block_size=32,
            enforce_eager=True,
            kv_cache_memory_bytes=16 << 20,
            max_model_len=1024,
            kv_transfer_config=plan.config,
            worker_extension_cls=plan.worker_extension,
        )
        result = engine.run("x", ids, 1, prefill_params(NIXL_CONNECTOR, TransferId("x")))
        transfer = result_transfer(
            result["params"],
            connector=NIXL_CONNECTOR,
            transfer_id=TransferId("x"),
            request=make_request("x", ids),
            num_cached_tokens=0,
        )
        assert engine.state()["used"] == 7

        async def call_workers(method: str, args: tuple[Any, ...]) -> Sequence[Any]:
            return engine.call_workers(method, *args)

        async def main() -> bool:
            client = RequestPlaneClient(Identity())
            try:
                return await release(client, transfer, call_workers=call_workers)
            finally:
                await client.close()

        started = time.monotonic()
        assert asyncio.run(main())
        assert engine.wait_idle() == {"used": 0, "requests": 0}
        assert time.monotonic() - started < LEASE_S / 4
        assert engine.call_workers("stator_release_kv", "unknown") == [True]
