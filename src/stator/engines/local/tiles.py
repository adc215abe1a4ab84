"""Matrix products whose rows do not depend on what else is computed with them.

A BLAS picks its kernel by the shapes, and a kernel may treat the last rows of a matrix differently from the first, so
the same row multiplied in another batch comes out different in its last bits. Here every product has the same number
of rows, `tile`, whatever the batch: rows are padded to whole tiles, and `choose_tile` finds, at load time and on this
machine's BLAS, a tile in which a row's result is independent of its place and its neighbours. A tile of one row always
is.
"""

import ctypes
import logging
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_TILES = (8, 4)
"""Sizes to try. Larger ones are no faster here (panels keep small products at full speed), but waste padding when few
sequences decode, and on AVX2 kernels rows of a 16-row tile differ."""

_PANEL_FLOPS = 1_000_000
"""rows * inner * columns up to which OpenBLAS multiplies without copying the matrix into packed form first. Copying
costs more than the product itself when there are only 8 rows."""

_PANEL_WIDTHS = (64, 32, 16)
"""A narrow panel lies in memory in the order in which it is read, which the CPU's prefetching needs once the weights
are larger than its cache."""

_WIDE_PANEL = 512
"""For matrices with so many rows that no narrow panel stays under the limit."""

_COLUMN_MULTIPLE = 16

_THREAD_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
    "MKL_Set_Num_Threads",
    "bli_thread_set_num_threads",
)

_log = logging.getLogger(__name__)


def use_one_blas_thread() -> bool:
    """Make numpy's BLAS compute on the calling thread in this process. False if it has no known way to say so.

    Tiles are too small to gain from threads, and two engines on one machine would fight over its cores. Environment
    variables only count before numpy is first imported; the function is found through numpy's own extension module,
    which works for a bundled and for a system BLAS. Results do not depend on it.
    """
    core: Any = np._core  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    library = ctypes.CDLL(core._multiarray_umath.__file__)
    for name in _THREAD_SETTERS:
        setter: Any = getattr(library, name, None)
        if setter is not None:
            setter(ctypes.c_int(1))
            return True
    _log.info("numpy's BLAS has no known function to set its threads; set OMP_NUM_THREADS=1 to save CPU time")
    return False


def panel_width(tile: int, inner: int, columns: int) -> int:
    """Columns per panel, so that a tile times a panel stays under the limit where BLAS copies the matrix."""
    fitting = [width for width in _PANEL_WIDTHS if tile * inner * width <= _PANEL_FLOPS]
    widest = fitting[0] if fitting else _WIDE_PANEL
    num_panels = -(-columns // widest)
    per_panel = -(-columns // num_panels)
    return -(-per_panel // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


class Matrix:
    """A weight matrix, ready to be applied to whole tiles of rows.

    weight: [columns, inner] as checkpoints store it. bias: [columns] or None.
    """

    def __init__(self, weight: F32, bias: F32 | None, tile: int) -> None:
        self.columns, self.inner = weight.shape
        self._tile = tile
        self._bias = bias
        width = panel_width(tile, self.inner, self.columns)
        num_panels = -(-self.columns // width)
        self._panels = np.zeros((num_panels, self.inner, width), np.float32)
        for index in range(num_panels):
            part = weight[index * width : (index + 1) * width]
            self._panels[index, :, : len(part)] = part.T

    def __call__(self, rows: F32) -> F32:
        """rows @ weight.T + bias. rows: [n, inner], contiguous, n a multiple of the tile. Returns [n, columns]."""
        num_panels, _, width = self._panels.shape
        tiles = len(rows) // self._tile
        out = np.empty((len(rows), num_panels * width), np.float32)
        by_panel = out.reshape(tiles, self._tile, num_panels, width).transpose(0, 2, 1, 3)
        np.matmul(rows.reshape(tiles, 1, self._tile, self.inner), self._panels, out=by_panel)
        if out.shape[1] != self.columns:
            out = np.ascontiguousarray(out[:, : self.columns])
        if self._bias is not None:
            out += self._bias
        return out


def pad_rows(rows: F32, tile: int) -> F32:
    """rows [n, width] with zero rows appended up to a multiple of the tile."""
    missing = -len(rows) % tile
    if not missing and rows.flags.c_contiguous:
        return rows
    padded = np.zeros((len(rows) + missing, rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    return padded


def choose_tile(
    matrices: Iterable[tuple[int, int]],
    attention: Iterable[tuple[int, int]],
    *,
    independent: Callable[[int, int, int], bool] | None = None,
) -> int:
    """The largest tile in which every row of these products is independent of its place and its neighbours.

    matrices: (inner, columns) of each weight. attention: (inner, columns) of the products per KV block, which are not
    cut into panels. `independent(tile, inner, columns)` is the check; the default measures this machine's BLAS.
    """
    check = independent or rows_are_independent
    weights, blocks = set(matrices), set(attention)
    for tile in _TILES:
        shapes = {(inner, panel_width(tile, inner, columns)) for inner, columns in weights} | blocks
        if all(check(tile, inner, columns) for inner, columns in sorted(shapes)):
            return tile
    _log.warning("this BLAS computes equal rows differently by their place in a tile; using single rows, which is slow")
    return 1


def rows_are_independent(tile: int, inner: int, columns: int) -> bool:
    """Whether [tile, inner] @ [inner, columns] gives one row the same bits at every place, next to any other rows."""
    random = np.random.Generator(np.random.Philox(key=inner * 1_000_003 + columns))
    matrix = random.standard_normal((inner, columns), np.float32)
    row = random.standard_normal(inner, np.float32)
    results: set[bytes] = set()
    for place in range(tile):
        rows = random.standard_normal((tile, inner), np.float32)
        rows[place] = row
        results.add((rows @ matrix)[place].tobytes())
    return len(results) == 1
