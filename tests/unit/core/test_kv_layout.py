import pytest

from stator.core.kv_layout import RowLayout, layout_digest, row_layout


@pytest.mark.parametrize(
    ("shape", "strides", "num_blocks", "expected"),
    [
        # vLLM on CPU: blocks first, contiguous.
        ((10, 2, 32, 128), (8192, 4096, 128, 1), 10, RowLayout(0, 1, (0, 2, 3, 4, 1), 16384)),
        # Keys and values apart.
        ((2, 10, 32, 2, 64), (40960, 4096, 128, 64, 1), 10, RowLayout(1, 1, (1, 0, 3, 4, 5, 2), 16384)),
        # An attention kernel with blocks half as long as the engine's.
        ((20, 16, 4), (64, 4, 1), 10, RowLayout(0, 2, (0, 1, 2, 3), 256)),
        # Heads lie outside of a block's tokens in memory.
        ((10, 32, 2, 64), (4096, 64, 2048, 1), 10, RowLayout(0, 1, (0, 3, 2, 4, 1), 8192)),
    ],
)
def test_where_a_block_is(
    shape: tuple[int, ...], strides: tuple[int, ...], num_blocks: int, expected: RowLayout
) -> None:
    assert row_layout(shape, strides, 2, num_blocks) == expected


@pytest.mark.parametrize(
    ("shape", "num_blocks", "reason"),
    [
        ((7, 32, 64), 10, "no dimension that counts 10 blocks"),
        ((2, 2, 32, 64), 2, "both of its first two"),
        ((2, 2, 32, 64), 1, "both of its first two"),
        ((4, 32), 0, "0 blocks"),
        ((), 3, "no dimension"),
    ],
)
def test_a_cache_whose_blocks_cannot_be_told_is_refused(shape: tuple[int, ...], num_blocks: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        row_layout(shape, shape, 2, num_blocks)


def digest(num_blocks: int, name: str = "a", dtype: str = "bf16", heads: int = 2, order: bool = False) -> str:
    shape = (num_blocks, heads, 32, 128)
    strides = (heads * 4096, 128, heads * 128, 1) if order else (heads * 4096, 4096, 128, 1)
    return layout_digest([(name, dtype, shape, row_layout(shape, strides, 2, num_blocks))], num_blocks)


def test_engines_of_different_capacity_share_a_layout_and_others_do_not() -> None:
    assert digest(10) == digest(50)
    others = [digest(10, name="b"), digest(10, dtype="fp16"), digest(10, heads=4), digest(10, order=True)]
    assert len({digest(10), *others}) == 5
