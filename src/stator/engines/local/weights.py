"""Tensors of a Hugging Face model directory: one safetensors file, or several with an index.

The files' headers are read directly: numpy has no BF16, so the library's numpy interface cannot return it.
Format: 8 bytes little-endian header length, a JSON header, then the data (safetensors' README, "Format").
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from stator.engines.local.model_config import Json, read_json
from stator.errors import ConfigError

F32 = NDArray[np.float32]

_MAX_HEADER_BYTES = 100_000_000
_FULL_HASH_BYTES = 64 << 20
_SAMPLE_BYTES = 4096
_SAMPLES_PER_TENSOR = 16
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor's bytes are. offset: from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class Weights:
    """The tensors of a model directory by name; data is read on demand.

    Raises ConfigError for missing, truncated or malformed files, naming file and tensor.
    """

    def __init__(self, model_dir: Path) -> None:
        self._where = str(model_dir)
        self._entries: dict[str, TensorEntry] = {}
        for path in _files(model_dir):
            self._entries.update(_read_header(path))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def load(self, name: str, shape: tuple[int, ...]) -> F32:
        """The tensor widened to float32. Raises ConfigError if it is missing or has another shape or type."""
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigError(f"{self._where}: the model needs tensor '{name}' {list(shape)}, no weight file has it")
        if entry.shape != shape:
            raise ConfigError(
                f"{entry.path}: tensor '{name}' has shape {list(entry.shape)}, the config asks for {list(shape)}"
            )
        if entry.dtype not in _ITEM_BYTES:
            known = ", ".join(sorted(_ITEM_BYTES))
            raise ConfigError(f"{entry.path}: tensor '{name}' is {entry.dtype}; the local engine reads {known}")
        return widen(_read(entry, 0, entry.num_bytes), entry.dtype).reshape(shape)

    def digest(self, names: Iterable[str]) -> str:
        """Hash over names, types, shapes and contents, the same however the tensors are spread over files.

        Contents count in full up to 64 MB in all; above that, evenly spaced samples of each tensor stand for it, so
        that a start does not read hundreds of gigabytes twice.
        """
        chosen = [(name, self._entries[name]) for name in sorted(names)]
        full = sum(entry.num_bytes for _, entry in chosen) <= _FULL_HASH_BYTES
        state = xxhash.xxh3_128()
        for name, entry in chosen:
            state.update(f"{name}\0{entry.dtype}\0{entry.shape}\0".encode())
            for offset, size in [(0, entry.num_bytes)] if full else _samples(entry.num_bytes):
                state.update(_read(entry, offset, size).tobytes())
        return state.hexdigest()


def widen(raw: NDArray[np.uint8], dtype: str) -> F32:
    """Little-endian F32, F16 or BF16 bytes as float32, exactly. BF16 is the upper half of a float32."""
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.view("<f4" if dtype == "F32" else "<f2").astype(np.float32)


def _samples(num_bytes: int) -> list[tuple[int, int]]:
    last = max(num_bytes - _SAMPLE_BYTES, 0)
    starts = sorted({last * i // (_SAMPLES_PER_TENSOR - 1) for i in range(_SAMPLES_PER_TENSOR)})
    return [(start, min(_SAMPLE_BYTES, num_bytes - start)) for start in starts]


def _read(entry: TensorEntry, offset: int, size: int) -> NDArray[np.uint8]:
    data = np.fromfile(entry.path, np.uint8, count=size, offset=entry.offset + offset)
    if len(data) != size:
        raise ConfigError(f"{entry.path}: the file became shorter while it was read")
    return data


def _files(model_dir: Path) -> list[Path]:
    single = model_dir / "model.safetensors"
    index = model_dir / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise ConfigError(f"{model_dir}: neither model.safetensors nor model.safetensors.index.json is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: 'weight_map' must be an object from tensor names to files")
    names = sorted({str(name) for name in cast(dict[str, Any], weight_map).values()})
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{index}: '{name}' must be the name of a file in the same directory")
        if not (model_dir / name).exists():
            raise ConfigError(f"{model_dir / name}: no such file, but {index.name} names it")
    return [model_dir / name for name in names]


def _read_header(path: Path) -> dict[str, TensorEntry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ConfigError(f"{path}: not a safetensors file, or cut short (header of {length} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ConfigError(f"{path}: the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: the safetensors header is not an object")
    start = 8 + length
    return {
        name: _entry(path, name, cast(Json, value), start, size)
        for name, value in cast(Json, header).items()
        if name != "__metadata__"
    }


def _entry(path: Path, name: str, value: Json, start: int, file_bytes: int) -> TensorEntry:
    try:
        begin, end = (int(v) for v in value["data_offsets"])
        dtype, shape = str(value["dtype"]), tuple(int(v) for v in value["shape"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path}: the header entry of tensor '{name}' is malformed") from None
    if not 0 <= begin <= end <= file_bytes - start:
        raise ConfigError(f"{path}: the data of tensor '{name}' lies outside the file; is the download complete?")
    count = int(np.prod(shape, dtype=np.int64))
    if min(shape, default=0) < 0 or end - begin != count * _ITEM_BYTES.get(dtype, (end - begin) / max(count, 1)):
        raise ConfigError(f"{path}: tensor '{name}' of shape {list(shape)} and type {dtype} has {end - begin} bytes")
    return TensorEntry(path, dtype, shape, start + begin, end - begin)
