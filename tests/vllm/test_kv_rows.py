"""Blocks of real tensors as bytes and back, in every layout that core.kv_layout knows. On the CPU."""

from typing import Any

import pytest
import torch

from stator.engines.vllm.kv_rows import KvRows

pytestmark = pytest.mark.vllm
NUM_BLOCKS = 6


def first(dtype: Any) -> Any:
    return torch.zeros((NUM_BLOCKS, 2, 4, 8), dtype=dtype)


def split(dtype: Any) -> Any:
    return torch.zeros((2, NUM_BLOCKS, 4, 2, 4), dtype=dtype)


def strided(dtype: Any) -> Any:
    return torch.zeros((NUM_BLOCKS, 2, 4, 8), dtype=dtype).permute(0, 2, 1, 3)


def interleaved(dtype: Any) -> Any:
    """One layer's part of a tensor that holds two layers block by block."""
    return torch.zeros((NUM_BLOCKS, 2, 4, 8), dtype=dtype)[:, 1]


def halved(dtype: Any) -> Any:
    return torch.zeros((2 * NUM_BLOCKS, 2, 8), dtype=dtype)


MAKERS = [first, split, strided, interleaved, halved]


def caches(dtype: Any) -> dict[str, Any]:
    made = {make.__name__: make(dtype) for make in MAKERS}
    made["shared"] = made["first"]
    return made


def fill(caches: dict[str, Any]) -> None:
    torch.manual_seed(1)
    for tensor in caches.values():
        tensor.copy_(torch.randn(tensor.shape).to(tensor.dtype))


def block(name: str, tensor: Any, block_id: int) -> Any:
    if name == "split":
        return tensor[:, block_id]
    if name == "halved":
        return tensor[2 * block_id : 2 * block_id + 2]
    return tensor[block_id]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_blocks_go_over_and_nothing_else_changes(dtype: str) -> None:
    source, target = caches(getattr(torch, dtype)), caches(getattr(torch, dtype))
    fill(source)
    one, two = KvRows(source, NUM_BLOCKS), KvRows(target, NUM_BLOCKS)
    assert one.layout == two.layout
    contents = one.export_blocks([5, 0, 2], 1 << 20)
    assert [len(content) for content in contents] == [one.block_bytes] * 3
    two.import_blocks(list(zip([1, 4, 3], contents, strict=True)))
    for name, tensor in target.items():
        for here, there in ((1, 5), (4, 0), (3, 2)):
            assert torch.equal(block(name, tensor, here).float(), block(name, source[name], there).float()), name
        for untouched in (0, 2, 5):
            assert not block(name, tensor, untouched).float().any(), name


def test_exports_are_bounded_and_never_empty() -> None:
    rows = KvRows(caches(torch.float32), NUM_BLOCKS)
    assert len(rows.export_blocks([1, 2, 3], 2 * rows.block_bytes + 1)) == 2
    assert len(rows.export_blocks([1, 2, 3], 1)) == 1


def test_a_block_of_another_size_or_place_changes_nothing() -> None:
    target = caches(torch.float32)
    rows = KvRows(target, NUM_BLOCKS)
    good = b"\x01" * rows.block_bytes
    for bad in [(1, good[1:]), (NUM_BLOCKS, good), (-1, good)]:
        with pytest.raises(ValueError, match="a block has"):
            rows.import_blocks([(0, good), bad])
    assert not any(tensor.any() for tensor in target.values())


def test_capacity_may_differ_and_content_may_not() -> None:
    def layout(num_blocks: int, dtype: Any = torch.float16, name: str = "a") -> str:
        return KvRows({name: torch.zeros((num_blocks, 2, 4, 8), dtype=dtype)}, num_blocks).layout

    assert layout(6) == layout(60)
    assert len({layout(6), layout(6, torch.bfloat16), layout(6, name="b")}) == 3
    with pytest.raises(ValueError, match="no KV cache"):
        KvRows({}, 6)
