"""One way to write the maths for numpy on the CPU and torch on a GPU.

The two agree on most functions and operators, torch takes numpy's `axis` and `keepdims`, and the few that differ are
methods here. Everything is float32; `xp` is the module.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

_LEAF = 256  # rows of a triangle that is inverted directly


class Arrays:
    """numpy on the CPU."""

    xp: Any = np
    name = "numpy"

    def asarray(self, values: Any) -> Any:
        """float32 values, or int64 ones, that numpy can see, as an array of this kind."""
        return np.asarray(values)

    def copied(self, rows: Any) -> Any:
        """A buffer of float32 that is about to go, as an array of this kind."""
        return np.array(rows)

    def to_numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def zeros(self, *shape: int) -> Any:
        return np.zeros(shape, np.float32)

    def empty_like(self, array: Any) -> Any:
        return np.empty_like(array)

    def integers(self, array: Any) -> np.ndarray:
        """Whole numbers from 0 to 255 as uint8, in numpy."""
        return self.to_numpy(array).astype(np.uint8)

    def descending(self, values: Any) -> Any:
        """Indices that sort values from the largest down; equal ones stay in order."""
        return np.argsort(-values, kind="stable")

    def cholesky(self, matrix: Any) -> Any:
        """The lower factor, or None where the matrix is not positive definite in float32."""
        try:
            factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return None
        return factor if np.isfinite(factor).all() else None

    def invert_leaf(self, lower: Any) -> Any:
        return np.tril(np.linalg.inv(lower))

    def round_scales(self, scales: Any) -> Any:
        """To values that float16 and bfloat16 both hold: 8 significant bits, from 2^-24 to float16's largest."""
        scales = np.ascontiguousarray(np.clip(scales, 2.0**-24, 65280.0), np.float32)
        bits = scales.view(np.uint32)
        bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float16).astype(np.float32)

    def memory_bytes(self) -> int:
        """Device memory in use, by all of its users; 0 on the CPU."""
        return 0


class TorchArrays(Arrays):
    """torch on a GPU (or, for tests, on the CPU)."""

    name = "torch"

    def __init__(self, device: str) -> None:
        try:
            import torch
        except ImportError:
            raise ImportError(
                "quantising on a GPU needs torch: pip install 'qwen-fast[quantize]', or give device='cpu'"
            ) from None
        self.torch: Any = torch
        self.xp = torch
        self.device = device
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ImportError(f"device={device!r}: the torch that is installed ({torch.__version__}) sees no GPU")
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 sums, as on the CPU

    def asarray(self, values: Any) -> Any:
        if isinstance(values, self.torch.Tensor):
            return values
        array = np.asarray(values)
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()
        return self.torch.from_numpy(array).to(self.device)

    def copied(self, rows: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the memory is read-only: it is only read
            tensor = self.torch.from_numpy(np.asarray(rows))
        return tensor.to(self.device, copy=True)

    def to_numpy(self, array: Any) -> np.ndarray:
        return array.cpu().numpy()

    def zeros(self, *shape: int) -> Any:
        return self.torch.zeros(shape, dtype=self.torch.float32, device=self.device)

    def empty_like(self, array: Any) -> Any:
        return self.torch.empty_like(array)

    def integers(self, array: Any) -> np.ndarray:
        return array.to(self.torch.uint8).cpu().numpy()

    def descending(self, values: Any) -> Any:
        return self.torch.argsort(values, descending=True, stable=True)

    def cholesky(self, matrix: Any) -> Any:
        factor, info = self.torch.linalg.cholesky_ex(matrix)
        return factor if int(info) == 0 and bool(self.torch.isfinite(factor).all()) else None

    def invert_leaf(self, lower: Any) -> Any:
        one = self.torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
        return self.torch.linalg.solve_triangular(lower, one, upper=False)

    def round_scales(self, scales: Any) -> Any:
        torch = self.torch
        scales = torch.clip(scales, 2.0**-24, 65280.0)
        return scales.to(torch.bfloat16).to(torch.float16).to(torch.float32)

    def memory_bytes(self) -> int:
        if not self.device.startswith("cuda"):
            return 0
        free, total = self.torch.cuda.mem_get_info(self.device)
        return int(total - free)


def arrays_for(device: str) -> Arrays:
    """device: "cpu", "cuda" or "cuda:N"."""
    return Arrays() if device == "cpu" else TorchArrays(device)


def invert_lower(a: Arrays, lower: Any) -> Any:
    """The inverse of a lower triangle, in its place: of [[A, 0], [B, C]] it is [[A', 0], [-C' B A', C']]."""
    n = lower.shape[0]
    if n <= _LEAF:
        lower[...] = a.invert_leaf(lower)
        return lower
    half = (n // 2 + _LEAF - 1) // _LEAF * _LEAF
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower(a, first)
    invert_lower(a, second)
    below[...] = -(second @ (below @ first))
    return lower
