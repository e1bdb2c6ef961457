"""Where a report was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
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


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for text in file:
            if text.startswith("model name"):
                return text.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
