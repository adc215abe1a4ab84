"""Blocks of vLLM's KV cache as bytes, and back: one row of every layer's tensor, joined in the layers' order.

CPU tensors are copied in place; CUDA tensors are gathered on the device, on a stream of its own, and cross to pinned
memory in one copy. Nothing here depends on a layer's meaning; `core.kv_layout` says where a block's bytes are.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from stator.core.kv_layout import layout_digest, row_layout


class KvRows:
    """block_bytes: of one block over all layers. layout: equal on engines whose blocks mean the same.

    Used by one thread at a time, except `mark`.
    """

    def __init__(self, caches: Mapping[str, Any], num_blocks: int) -> None:
        """caches: layer name -> torch tensor, in one order on all engines. Raises ValueError for a cache whose blocks
        cannot be told, or no cache at all."""
        self._torch: Any = importlib.import_module("torch")
        self._views: list[Any] = []
        self._row_bytes: list[int] = []
        layers: list[tuple[str, str, Sequence[int], Any]] = []
        seen: set[tuple[int, ...]] = set()
        for name, tensor in caches.items():
            # Layers that share their keys and values share the tensor.
            place = (tensor.data_ptr(), *tensor.shape, *tensor.stride())
            if place in seen:
                continue
            seen.add(place)
            layout = row_layout(tensor.shape, tensor.stride(), tensor.element_size(), num_blocks)
            raw = tensor.view(self._carrier(tensor.element_size()))
            split = raw.unflatten(layout.block_dim, (num_blocks, layout.rows_per_block))
            self._views.append(split.permute(layout.order))
            self._row_bytes.append(layout.row_bytes)
            layers.append((name, str(tensor.dtype), tuple(tensor.shape), layout))
        if not layers:
            raise ValueError("the engine has no KV cache to transfer")
        self._num_blocks = num_blocks
        self._device = self._views[0].device
        self._stream: Any = self._torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._mark: Any = None
        self.block_bytes = sum(self._row_bytes)
        self.layout = layout_digest(layers, num_blocks)

    def mark(self) -> None:
        """What the calling thread has put on the device's current stream so far comes before every later import."""
        if self._stream is not None:
            event = self._torch.cuda.Event()
            event.record(self._torch.cuda.current_stream(self._device))
            self._mark = event

    def export_blocks(self, block_ids: Sequence[int], num_bytes: int) -> list[bytes]:
        """Contents of the leading blocks, at least one, until num_bytes is reached."""
        count = max(1, min(len(block_ids), num_bytes // self.block_bytes))
        rows = self._on_stream(self._gather, block_ids[:count])
        return [rows[index].tobytes() for index in range(count)]

    def import_blocks(self, blocks: Sequence[tuple[int, bytes]]) -> None:
        """Fills blocks, given as (block id, content); all are written when it returns.

        Raises ValueError for contents of another size, before anything is written.
        """
        for block_id, content in blocks:
            if len(content) != self.block_bytes or not 0 <= block_id < self._num_blocks:
                raise ValueError(
                    f"{len(content)} bytes for block {block_id}; a block has {self.block_bytes}, "
                    f"and there are {self._num_blocks}"
                )
        self._on_stream(self._scatter, [block_id for block_id, _ in blocks], b"".join(data for _, data in blocks))

    def _on_stream(self, function: Any, *args: Any) -> Any:
        if self._stream is None:
            return function(*args)
        with self._torch.cuda.device(self._device), self._torch.cuda.stream(self._stream):
            if self._mark is not None:
                self._stream.wait_event(self._mark)
            result = function(*args)
            self._stream.synchronize()
            return result

    def _gather(self, block_ids: Sequence[int]) -> Any:
        """uint8 array, [len(block_ids), block_bytes]."""
        torch = self._torch
        index = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        parts = [view.index_select(0, index).reshape(len(block_ids), -1).view(torch.uint8) for view in self._views]
        rows = torch.cat(parts, dim=1)
        if self._stream is not None:
            pinned = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=True)
            pinned.copy_(rows, non_blocking=True)
            self._stream.synchronize()
            rows = pinned
        return rows.numpy()

    def _scatter(self, block_ids: Sequence[int], content: bytes) -> None:
        torch = self._torch
        rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(block_ids), self.block_bytes)
        if self._stream is not None:
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        index = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        parts = rows.split(self._row_bytes, dim=1)
        for view, part in zip(self._views, parts, strict=True):
            view.index_copy_(0, index, part.contiguous().view(view.dtype).view(len(block_ids), *view.shape[1:]))

    def _carrier(self, item_bytes: int) -> Any:
        """An integer type of the same size: gathers and scatters are not defined for all of the small float types."""
        torch = self._torch
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item_bytes]
