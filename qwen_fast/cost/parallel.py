"""The same load on one device and on several: on which numbers of them, and what is measured of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .measure import Effort, device_indices, run_load
from .nvml import GpuMemory
from .workloads import Workload

COUNTS = (1, 2, 4, 8)
USERS = (1, 16, 32, 64, 128)
MOST = 64
PARTS = ("embedding", "layers", "head", "workspace", "kv_cache", "kv_window")


@dataclass(frozen=True)
class Compared:
    """A number of devices. why: not measured, because."""

    count: int
    why: str | None = None


def compared(
    asked: Sequence[int] | None, own: int, devices: int, on_gpu: bool, same_engine: bool = False
) -> list[Compared]:
    """asked None: 1, 2, 4 and 8 GPUs as far as there are so many, and the report's own number; nothing on the CPU, where ranks
    are threads that share the cores, or where one number alone is left. devices: GPUs of this machine. same_engine: no
    other engine may be loaded."""
    if asked is None:
        counts = sorted({count for count in COUNTS if count <= devices} | {own}) if on_gpu else []
        counts = counts if len(counts) > 1 else []
    else:
        counts = sorted(set(asked))
    found = []
    for count in counts:
        why = None
        if on_gpu and count > devices:
            why = f"this machine shows {devices} GPU{'s' if devices != 1 else ''}"
        elif same_engine and count != own:
            why = "it needs another engine than the one that is loaded; `qwen-fast cost` measures it"
        found.append(Compared(count, why))
    return found


def users_of(given: Sequence[int] | None, max_num_seqs: int) -> tuple[int, ...]:
    return tuple(users for users in (USERS if given is None else given) if users <= max_num_seqs)


def effort_of(effort: Effort) -> Effort:
    """There is a window for every number of devices and of users: three of each at most."""
    return replace(effort, windows=min(3, effort.windows))


def engine_stage(llm: Any) -> dict[str, Any]:
    """What an engine over several devices holds: its plan is of the device with the most."""
    info, memory = llm.info(), llm.stats()["memory"]
    found = {
        "description": info["description"],
        "load_seconds": info["load_seconds"],
        "plan_bytes": {part: memory[f"{part}_bytes"] for part in PARTS},
        "overhead_bytes": memory["device_overhead_bytes"],
        "in_use_bytes": None,
    }
    indices = device_indices(llm)
    if indices:
        try:
            found["in_use_bytes"] = GpuMemory(indices).used_bytes_each()
        except (OSError, AttributeError):
            pass  # the table says that NVML cannot be read
    return found


def load_stage(llm: Any, workload: Workload, users: int, effort: Effort) -> dict[str, Any]:
    found = run_load(llm, workload, users, effort)
    del found["memory"]["curve"]
    return found


def key(count: int, what: str | int) -> str:
    return f"gpus:{count}:{what}"


def load_of(data: Mapping[str, Any], count: int, users: int) -> Mapping[str, Any] | None:
    """A load of the comparison; the report's own number of devices has run some of them before."""
    stages, said = data["stages"], data["gpus"]
    found = stages.get(key(count, users))
    if found is None and count == said["own"]:
        found = stages.get(f"load:{said['workload']}:{users}")
    return found
