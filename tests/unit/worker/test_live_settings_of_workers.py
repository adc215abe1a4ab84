"""Which settings change what of a decode worker and of a router, in mid-life."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from stator.config.schema import VllmWorkerConfig
from stator.core.disagg import DisaggPolicy
from stator.core.routing import RouterMode
from stator.core.settings import SETTINGS
from stator.discovery.memory import MemoryDiscovery, MemoryKeyStore
from stator.router import Router
from stator.runtime.directory import InstanceDirectory
from stator.transport import Identity, RequestPlaneClient
from stator.worker import DecodeWorker


class Followed:
    """Takes the place of ServiceContext.follow_setting."""

    def __init__(self) -> None:
        self.options: dict[str, str] = {}
        self.apply: dict[str, Callable[[Any], None]] = {}

    def __call__(self, name: str, option: str, apply: Callable[[Any], None]) -> None:
        assert name in SETTINGS
        self.options[name], self.apply[name] = option, apply


def decode_worker(policy: DisaggPolicy) -> DecodeWorker:
    worker = object.__new__(DecodeWorker)
    worker._policy = policy
    return worker


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("conditional-disagg", "conditional_disagg", True),
        ("max-local-prefill-length", "max_local_prefill_length", 17),
        ("max-prefill-queue-size", "max_prefill_queue_size", 3),
    ],
)
def test_each_setting_changes_its_part_of_the_policy(name: str, option: str, value: object) -> None:
    before = DisaggPolicy(remote_prefill=True, conditional_disagg=False)
    worker, followed = decode_worker(before), Followed()
    worker.follow_settings(followed)
    assert followed.options[name] == option and option in VllmWorkerConfig.__struct_fields__
    followed.apply[name](value)
    changed = {f for f in DisaggPolicy.__dataclass_fields__ if getattr(worker._policy, f) != getattr(before, f)}
    assert changed == {option} and getattr(worker._policy, option) == value


def test_without_remote_prefill_there_is_nothing_to_decide() -> None:
    followed = Followed()
    decode_worker(DisaggPolicy(remote_prefill=False, conditional_disagg=False)).follow_settings(followed)
    assert not followed.apply


def test_a_routers_mode_changes_and_its_index_comes_and_goes() -> None:
    async def scene() -> None:
        client = RequestPlaneClient(Identity(token="a-token"))
        directory = InstanceDirectory(MemoryDiscovery(MemoryKeyStore()))
        router = Router(client=client, directory=directory, mode=RouterMode.KV, min_workers=1, rng=Random(1))
        followed = Followed()
        try:
            router.follow_settings(followed, "mode")
            assert followed.options == {"router-mode": "mode"} and router.index is not None
            followed.apply["router-mode"]("round-robin")
            assert router._core.mode is RouterMode.ROUND_ROBIN and router.index is None
            followed.apply["router-mode"]("kv")
            assert router._core.mode is RouterMode.KV and router.index is not None
        finally:
            router.close()
            await client.close()

    asyncio.run(scene())
