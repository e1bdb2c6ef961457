"""How much of a GPU's memory is in use, from NVML by ctypes: a read takes microseconds and makes no context on a device."""

from __future__ import annotations

import ctypes
import os
from typing import Any


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class GpuMemory:
    """indices: CUDA's numbers of the GPUs. OSError where NVML, or one of them, is not there; then there is no figure."""

    def __init__(self, indices: list[int], library: Any = None) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        self._check(self._nvml.nvmlInit_v2(), "nvmlInit_v2")
        self._handles = [self._handle(index) for index in indices]

    def used_bytes(self) -> int:
        """Of all these GPUs together, by all processes. OSError where a read fails."""
        return sum(self.used_bytes_each())

    def used_bytes_each(self) -> list[int]:
        """Of each GPU, by all processes. OSError where a read fails."""
        found = []
        for handle in self._handles:
            memory = _Memory()
            self._check(self._nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)), "nvmlDeviceGetMemoryInfo")
            found.append(int(memory.used))
        return found

    def _handle(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        name = nvml_name(index, os.environ.get("CUDA_VISIBLE_DEVICES"))
        if isinstance(name, int):
            status = self._nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(name), ctypes.byref(handle))
        else:
            status = self._nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        self._check(status, f"the handle of GPU {name}")
        return handle

    def _check(self, status: int, what: str) -> None:
        if status != 0:
            raise OSError(f"NVML: {what} failed with code {status}")


def nvml_name(index: int, visible: str | None) -> int | str:
    """NVML counts all GPUs, CUDA those of CUDA_VISIBLE_DEVICES: the number or UUID of CUDA's GPU `index`."""
    entries = [entry.strip() for entry in (visible or "").split(",") if entry.strip()]
    if index >= len(entries):
        return index
    return int(entries[index]) if entries[index].isdecimal() else entries[index]
