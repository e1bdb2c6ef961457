"""Where a report was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import __version__


def machine(llm: Any) -> dict[str, Any]:
    """Where the run took place."""
    from ..native import _engine

    gpus = [gpu for gpu in _engine.device_info() if gpu["usable"]] if llm.info()["backend"] != "cpu" else []
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": [{"name": gpu["name"], "total_bytes": gpu["total_bytes"]} for gpu in gpus],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qwen_fast": __version__,
        "compiler": _engine.build_info()["compiler"],
        "load_average": os.getloadavg()[0],
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def usable_gpus() -> int:
    """How many this build can use here."""
    from ..native import _engine

    return sum(bool(gpu["usable"]) for gpu in _engine.device_info())


def device_name(document: Mapping[str, Any]) -> str:
    """Of a report: "NVIDIA H200", "2 x NVIDIA H200", or the processor."""
    found = document["machine"]
    if not found["gpus"]:
        return f"{found['cpu']}, {found['cpus']} CPUs"
    count = int(document["engine"].get("tensor_parallel_size") or 1)
    return f"{count} x {found['gpus'][0]['name']}" if count > 1 else str(found["gpus"][0]["name"])


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for text in file:
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
