"""A dead prefill engine does not reach vLLM, which would stall every request for its handshake: at the adapter's seam,
with a vLLM that notes what it is asked for."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from stator.engines.vllm.args import VllmSettings
from stator.engines.vllm.connectors import NIXL_CONNECTOR, STATOR_CONNECTOR
from stator.engines.vllm.engine import VllmEngine
from stator.engines.vllm.transfer import result_transfer
from stator.errors import StatorError
from stator.ids import InstanceId, TransferId
from stator.messages.engine import TokenDelta
from stator.testing.contracts.engine_suite import make_request, with_transfer
from stator.transport import Identity, Listen, RequestPlaneClient, RequestPlaneServer
from stator.worker import WorkerHost


class NotingVllm:
    """Implements what the adapter uses of StartedVllm. Answers each request with token 7 at once."""

    num_blocks, block_size, max_num_seqs, max_num_batched_tokens = 64, 4, 8, 64
    max_model_len, vocab_size, version, device = 200, 100, "0.32.0", "cpu"
    eos_token_ids = frozenset[int]()
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="m", dtype="torch.float32", revision=None, hf_config=SimpleNamespace(to_dict=lambda: {"a": 1})
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", block_size=4),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
    )

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def on_dead(self, callback: Callable[[str], None]) -> None:
        del callback

    async def add(
        self,
        request_id: str,
        token_ids: list[int],
        sampling: dict[str, Any],
        *,
        on_output: Callable[[Any], None],
        on_added: Callable[[str], None],
        **_options: Any,
    ) -> None:
        self.asked.append({"token_ids": token_ids, "extra_args": sampling.get("extra_args")})
        on_added(request_id)
        on_output(SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7], finish_reason="length")]))

    async def supported_tasks(self) -> frozenset[str]:
        return frozenset({"generate"})

    async def abort(self, core_id: str) -> None:
        del core_id

    def cached_split(self, output: Any, core_id: str | None) -> tuple[int, int]:
        del output, core_id
        return 0, 0

    async def shut_down(self, timeout_s: float) -> None:
        del timeout_s


class NotingLaunch:
    def __init__(self) -> None:
        self.vllm = NotingVllm()

    def has_gpu(self) -> bool:
        return False

    async def start(self, arguments: list[str], record: Any) -> Any:
        del arguments, record
        return self.vllm


class Answer:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.ended: asyncio.Future[StatorError | None] = asyncio.get_running_loop().create_future()

    def items(self, items: Sequence[TokenDelta], /) -> None:
        self.token_ids += [token for delta in items for token in delta.token_ids]

    def end(self, error: StatorError | None = None, /) -> None:
        self.ended.set_result(error)


def at(connector: str, port: int) -> dict[str, Any]:
    """vLLM's transfer parameters of a prefill engine on this port."""
    if connector == STATOR_CONNECTOR:
        return {"do_remote_prefill": True, "remote_addresses": [[f"tcp://127.0.0.1:{port}"]]}
    return {"do_remote_prefill": True, "remote_host": "127.0.0.1", "remote_port": port, "remote_request_id": "v"}


async def ask(connector: str, port: int) -> NotingVllm:
    """Generate once from the blocks of a prefill engine on this port. Returns what vLLM was asked."""
    launch = NotingLaunch()
    flags = {"enable_prefix_caching": False}
    settings = VllmSettings("stator:tiny-llama", "m", flags, kv_transfer_config={"kv_connector": connector})
    engine = VllmEngine(settings, launcher=launch)
    identity = Identity(instance_id=InstanceId("d"), token="secret")
    client, server = RequestPlaneClient(identity), RequestPlaneServer(identity, Listen())
    await server.start()
    died: list[str] = []
    await engine.start(WorkerHost(instance_id=InstanceId("d"), client=client, server=server, on_dead=died.append))
    try:
        request = make_request("r", list(range(10)), max_tokens=1)
        params = at(connector, port)
        transfer = result_transfer(
            params, connector=connector, transfer_id=TransferId("t"), request=request, num_cached_tokens=0
        )
        answer = Answer()
        engine.generate(with_transfer(request, transfer), answer)
        assert await asyncio.wait_for(answer.ended, 10) is None
        assert answer.token_ids == [7]
    finally:
        await engine.stop()
        await client.close()
        await server.close()
    return launch.vllm


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start sets these for vLLM's processes; here they must not outlive the test."""
    values = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "1",
    }
    for key, value in values.items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("connector", [STATOR_CONNECTOR, NIXL_CONNECTOR])
def test_blocks_of_a_living_peer_are_fetched(connector: str) -> None:
    with socket.socket() as peer:
        peer.bind(("127.0.0.1", 0))
        peer.listen()
        port = peer.getsockname()[1]
        vllm = asyncio.run(ask(connector, port))
    assert vllm.asked == [
        {"token_ids": list(range(10)), "extra_args": {"kv_transfer_params": at(connector, port)}},
    ]


@pytest.mark.parametrize("connector", [STATOR_CONNECTOR, NIXL_CONNECTOR])
def test_vllm_never_hears_of_a_dead_peer_and_computes(connector: str, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as gone, caplog.at_level(logging.WARNING):
        gone.bind(("127.0.0.1", 0))  # not listening: nobody else gets the port, and connections are refused
        vllm = asyncio.run(ask(connector, gone.getsockname()[1]))
    assert vllm.asked == [{"token_ids": list(range(10)), "extra_args": None}]
    assert "the prefill engine cannot be reached" in caplog.text
