"""The graph that the suite runs: the examples' components, with workers that fail when a file tells them to.

Copied beside `components` into a directory of the deployment's own; the files lie in `orders` there.
"""

import os
import pathlib
import threading
import time
from typing import Any

from components.frontend import Frontend
from components.prefill_worker import PrefillWorker as Prefiller
from components.processor import Processor
from components.router import Router
from components.worker import VllmWorker as Worker
from stator.config.models import resolve_model
from stator.graph import endpoint, on_start, service
from stator.messages.kv_events import KvChanges, KvItem, KvSubscribe
from stator.messages.tokens import unpack
from stator.processor import ModelTokenizer

ORDERS = pathlib.Path(__file__).with_name("orders")
POISON = "☠☠☠☠"
SLOW_EXPORT_S = 0.3


def ordered(name: str) -> str | None:
    """What the order says; None without it."""
    try:
        return (ORDERS / name).read_text()
    except FileNotFoundError:
        return None


@service(name="PrefillWorker", role="prefill")
class PrefillWorker(Prefiller):
    """Order `hold-export`: no KV block is handed over while it is there. `slow-export`: each takes its time. Every
    block that was handed over adds a byte to `exported-PID`."""

    @on_start
    def arm(self) -> None:
        runner, export = self.engine._runner, self.engine._runner.export_block

        def slow_export(block_id: int) -> bytes:
            while ordered("hold-export") is not None:
                time.sleep(0.02)
            if ordered("slow-export") is not None:
                time.sleep(SLOW_EXPORT_S)
            with (ORDERS / f"exported-{os.getpid()}").open("ab") as count:
                count.write(b".")
            return export(block_id)

        runner.export_block = slow_export


class Garbled:
    """A call whose items are dropped, doubled or sent in another order while the order `kv-events` says so."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._kept: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def items(self, items: list[Any]) -> None:
        what = ordered("kv-events")
        if what == "drop":
            # Digests come through: a stream that is silent altogether is subscribed to again, and no loss is noticed.
            items = [item for item in items if not isinstance(item, KvChanges)]
            if not items:
                return
        if what == "reorder":
            self._kept = [*items, *self._kept]
            if len(self._kept) < 2:
                return
            items, self._kept = self._kept, []
        self._call.items([*items, *items] if what == "double" else items)


@service(name="VllmWorker", role="decode")
class VllmWorker(Worker):
    """Its engine crashes of a prompt with POISON in it; in a step once the order `step` says hang or crash, which the
    first to see it takes away; and takes ten times as long for a step while `slow-step` names its process."""

    @on_start
    def arm(self, context) -> None:
        tokenizer = ModelTokenizer.load(resolve_model(context.config.engine_values()["model"]))
        poison = unpack(tokenizer.encode(POISON, add_special_tokens=False))
        runner, step = self.engine._runner, self.engine._runner.step
        faults = getattr(self.engine, "faults", None)

        def broken_step(chunks):
            for chunk in chunks:
                ids = list(chunk.token_ids)
                if any(ids[n : n + len(poison)] == poison for n in range(len(ids))):
                    raise RuntimeError("this prompt crashes the engine")
            if faults is not None:
                faults.slowdown = 10.0 if ordered("slow-step") == str(os.getpid()) else 1.0
            order = ordered("step")
            if order is None:
                return step(chunks)
            try:
                (ORDERS / "step").unlink()
            except FileNotFoundError:
                return step(chunks)
            if order == "crash":
                raise RuntimeError("told to crash")
            return threading.Event().wait()

        runner.step = broken_step

    @endpoint(request=KvSubscribe, item=KvItem)
    def kv_events(self, call) -> None:
        super().kv_events(Garbled(call))


Frontend.link(Processor).link(Router).link(VllmWorker).link(PrefillWorker)
