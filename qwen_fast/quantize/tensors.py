"""safetensors files, read in place and written durably, with numpy alone."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1, "I8": 1}
_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "I64": "<i8"}
FLOATS = ("F32", "F16", "BF16")
_PIECE = 64 << 20
MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it. data: its bytes, any buffer."""

    dtype: str
    shape: tuple[int, ...]
    data: Any

    @property
    def size_bytes(self) -> int:
        size = _SIZES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


class TensorFiles:
    """All tensors of a checkpoint directory, memory-mapped: a mapping from name to Stored."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
        else:
            names = ["model.safetensors"]
        self.paths = [directory / name for name in names]
        self._tensors: dict[str, Stored] = {}
        self.headers: list[bytes] = []
        for path in self.paths:
            header, tensors = read_file(path)
            self.headers.append(header)
            self._tensors.update(tensors)

    def __getitem__(self, name: str) -> Stored:
        if name not in self._tensors:
            raise ModelError(f"tensor {name!r} is missing from the checkpoint")
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def forget(self) -> None:
        """Lets go of the pages read so far: they stay in the system's cache, and are mapped again where they are needed."""
        for mapped in {id(stored.data.obj): stored.data.obj for stored in self._tensors.values()}.values():
            if isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if all(isinstance(file, str) and "/" not in file for file in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise ModelError(f"{index}: expected an object with a weight_map from tensors to files beside it")


def read_file(path: Path) -> tuple[bytes, dict[str, Stored]]:
    """The header's bytes, and the tensors over a mapping of the file, which lives as long as they do."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    length = int.from_bytes(data[:8], "little")
    if size < 8 or not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        raise ModelError(f"{path} is no safetensors file: {size} bytes, a header of {length}")
    header = bytes(data[8 : 8 + length])
    tensors = {}
    try:
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            stored = Stored(entry["dtype"], tuple(entry["shape"]), data[8 + length + begin : 8 + length + end])
            if not 0 <= begin <= end <= size - 8 - length or stored.size_bytes != end - begin:
                raise ValueError(f"{name} does not fit its offsets")
            tensors[name] = stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no safetensors file that can be read: {error}") from None
    return header, tensors


def to_f32(stored: Stored, name: str) -> np.ndarray:
    """float32 values; a copy."""
    if stored.dtype not in FLOATS:
        raise ModelError(f"tensor {name!r} has dtype {stored.dtype}; expected one of {', '.join(FLOATS)}")
    raw = np.frombuffer(stored.data, _NUMPY[stored.dtype]).reshape(stored.shape)
    if stored.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def from_array(array: np.ndarray, dtype: str) -> Stored:
    """Whole numbers to I32 or I64, floats to F32, F16 or BF16 (to nearest, ties to even)."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        raw = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype("<u2")
    else:
        raw = np.ascontiguousarray(array.astype(_NUMPY[dtype]))
    return Stored(dtype, tuple(array.shape), raw.data.cast("B") if raw.size else b"")


def round_to(array: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the dtype holds."""
    return to_f32(from_array(array, dtype), dtype)


def write_file(path: Path, tensors: Mapping[str, Stored], durable: bool = True) -> None:
    """All or nothing: written beside, synced (where durable) and renamed. OSError names the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size_bytes],
        }
        end += tensor.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            data = memoryview(tensor.data)
            for at in range(0, len(data), _PIECE):
                yield data[at : at + _PIECE]

    write_parts(path, parts(), durable)


def write_parts(path: Path, parts: Any, durable: bool = True) -> None:
    """The parts (buffers) as the file's whole content; durable: on the disk when this returns."""
    beside = path.with_name(path.name + ".part")
    try:
        with beside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        beside.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from None


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
