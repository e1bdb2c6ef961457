"""What must be the same for a run to go on from an earlier one's measurements, and the reading of those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .machine import cpu_name
from .measure import device_indices
from .workloads import Workload

PEAKS = ("peaks", "peaks-after")


def identity(
    llm: Any,
    options: Mapping[str, Any],
    quick: bool,
    window_s: float | None,
    workloads: Sequence[tuple[Workload, Any]],
    windows: int | None = None,
) -> dict[str, Any]:
    """Plain JSON. workloads: each as it is asked (all its requests count), with its numbers of users. The model is what
    its files are, wherever they lie."""
    return {
        "model": model_stamp(llm.model_dir, options.get("load_format") == "dummy"),
        "options": {name: str(value) for name, value in sorted(options.items()) if value is not None},
        "workloads": [
            {"name": one.name, "users": list(users), "requests": len(one.items), "sha256": workload_stamp(one)}
            for one, users in workloads
        ],
        "quick": quick,
        "window_s": window_s,
        **({} if windows is None else {"windows": windows}),
        "cpu": cpu_name(),
        "gpus": _gpus(llm),
        "version": __version__,
    }


def model_stamp(directory: str | Path, dummy: bool) -> str:
    """SHA-256 in hex of config.json and, unless the weights are random ones (dummy), of the names and sizes of the
    safetensors files. The directory's own name does not count."""
    found = hashlib.sha256(Path(directory, "config.json").read_bytes())
    if not dummy:
        for path in sorted(Path(directory).glob("*.safetensors")):
            found.update(f"\n{path.name} {path.stat().st_size}".encode())
    return found.hexdigest()


def workload_stamp(workload: Workload) -> str:
    """SHA-256 in hex of all requests of a workload."""
    found = hashlib.sha256(str(workload.shared_tokens).encode())
    for item in workload.items:
        found.update(repr(item).encode())
    return found.hexdigest()


def _gpus(llm: Any) -> list[dict[str, Any]]:
    indices = device_indices(llm)
    if not indices:
        return []
    from ..native import _engine

    gpus = [gpu for gpu in _engine.device_info() if gpu["index"] in indices]
    return [{"name": gpu["name"], "total_bytes": gpu["total_bytes"]} for gpu in gpus]


def earlier_run(
    path: Path, now: Mapping[str, Any], peaks_given: bool, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """stages, began and seconds of the run whose measurements lie at `path`, where its identity is `now`; else None, and
    `say` is told why it is begun anew. Peaks are taken up only where neither run was given them."""
    if not path.is_file():
        return None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        then = dict(earlier["identity"])
        differing = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        if differing:
            say(f"{path} is of another run ({', '.join(differing)} differ); it is begun anew")
            return None
        stages = dict(earlier["stages"])
        if peaks_given or any(earlier["settings"][name] is not None for name in ("peak_gbs", "peak_tflops")):
            for name in PEAKS:
                stages.pop(name, None)
        return {"stages": stages, "began": str(earlier["began"]), "seconds": float(earlier.get("seconds", 0.0))}
    except (ValueError, KeyError, TypeError):
        say(f"{path} is no file of measurements; it is begun anew")
        return None
