"""One engine over several GPUs and its rows: what gpu_tp.py runs in a process of its own, so that one that fails or hangs costs
its own rows alone. Reads a JSON object from its argument, writes a line of JSON for each thing that it has measured.

Order: load, logits twice, the rows' times, memory of each card, and last the rows once more under torch.profiler (CUPTI),
whose records of every GPU tp_split.py takes apart.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import spread
from gpu_common import check_logits, decode_run, step_bytes, step_flops
from gpu_prefill import prefill
from timeline import read_trace
from tp_split import Rank, decode_steps, prompt_runs, split

PROMPT_TOKENS, NEW_TOKENS = 128, 256
PREFILL_TOKENS = 2048
SPLIT_TOKENS = 24  # decode steps under the profiler
SPLIT_RUNS, PAUSE_S = 2, 0.05  # prompts under the profiler, and the pause between them
PARTS = ("embedding", "layers", "head", "workspace", "kv_cache", "kv_window")


def tell(kind: str, **said: Any) -> None:
    print("TP " + json.dumps({"kind": kind, **said}), flush=True)


def open_engine(asked: dict[str, Any]) -> Any:
    from qwen_fast import _engine

    most = max(row["batch"] for row in asked["rows"])
    positions = max(most * (PROMPT_TOKENS + NEW_TOKENS + 64), PREFILL_TOKENS + 256) + 2 * 4096
    options = {"quantization": asked["quantization"]} if asked["quantization"] else {}
    return _engine.Engine(
        asked["model"],
        device=asked["device"],
        tensor_parallel_size=asked["gpus"],
        load_format="dummy",
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        max_model_len=8192,
        kv_cache_tokens=positions,
        **options,
    )


def once(engine: Any, batch: int, new_tokens: int) -> float:
    """Seconds of a decode step, or (batch 0) of a prompt."""
    if batch == 0:
        return prefill(engine, PREFILL_TOKENS)[0]
    return decode_run(engine, batch, PROMPT_TOKENS, new_tokens, num_gates=2 if batch > 1 else 0)[0]


def work(engine: Any, batch: int, gpus: int) -> dict[str, float]:
    """Bytes and operations of the rank with the most: memory's weights are that rank's; keys and values are shared out."""
    tokens = batch or PREFILL_TOKENS
    context = PROMPT_TOKENS + NEW_TOKENS / 2 if batch else PREFILL_TOKENS / 2
    weights = step_bytes(engine, 0, 0)
    moved = weights + (step_bytes(engine, tokens, context) - weights) / gpus
    return {"bytes": moved, "flops": step_flops(engine.info(), tokens, context) / gpus}


# -- memory ------------------------------------------------------------------------------------------------------


def card_bytes(pid: int, gpus: int) -> list[int] | None:
    """What NVML, through nvidia-smi, counts for a process on each of the first GPUs; None where it does not list it."""

    def ask(what: str) -> list[list[str]]:
        command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return [line.split(", ") for line in shown.splitlines() if line]

    try:
        cards = {uuid: int(index) for index, uuid in ask("--query-gpu=index,uuid")}
        used = ask("--query-compute-apps=pid,gpu_uuid,used_memory")
    except (OSError, subprocess.SubprocessError):
        return None
    found = {cards[uuid]: int(mib) << 20 for one, uuid, mib in used if int(one) == pid and mib.isdigit()}
    return [found[index] for index in range(gpus)] if all(index in found for index in range(gpus)) else None


def memory_of(engine: Any, gpus: int) -> dict[str, Any]:
    """The plan of the rank with the most, and what NVML counts on each card."""
    memory = engine.stats()["memory"]
    planned = sum(memory[f"{part}_bytes"] for part in PARTS)
    total = planned + memory["device_overhead_bytes"]
    found: dict[str, Any] = {f"{part}_bytes": memory[f"{part}_bytes"] for part in PARTS}
    found |= {"planned_bytes": planned, "overhead_bytes": memory["device_overhead_bytes"], "total_bytes": total}
    counted = card_bytes(os.getpid(), gpus)
    found |= {"nvml_bytes": counted, "load_seconds": engine.info()["load_seconds"]}
    if counted is not None:
        found |= {"off_bytes": max(counted) - total, "allowed_bytes": max(0.03 * max(counted), 96 << 20)}
    return found


# -- where the time goes -----------------------------------------------------------------------------------------


def watch_gpus(gpus: int) -> None:
    """The profiler records what torch has initialised."""
    import torch

    for index in range(gpus):
        torch.zeros(1, device=f"cuda:{index}")


def profiled(run: Callable[[], list[float]]) -> tuple[list[float], list[Any]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        seconds = run()
    with TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return seconds, read_trace(json.loads(path.read_text()))


def take_apart(engine: Any, batch: int) -> tuple[dict[int, Rank], float, float]:
    """The ranks' mean step; its seconds just before without the profiler, and with it. Fewer tokens than a row's, so shorter
    contexts; a pause before each prompt, so a cooler GPU."""

    def run() -> list[float]:
        if batch:
            return [once(engine, batch, SPLIT_TOKENS)]
        found = []
        for _ in range(SPLIT_RUNS):
            time.sleep(PAUSE_S)
            found.append(once(engine, 0, 0))
        return found

    before = statistics.mean(run())
    seconds, events = profiled(run)
    stretches = decode_steps(events) if batch else prompt_runs(events, 0.5e6 * PAUSE_S, 0.5e6 * before)
    return split(stretches), before, statistics.mean(seconds)


# -- the process -------------------------------------------------------------------------------------------------


def measure(engine: Any, asked: dict[str, Any], until: float) -> None:
    gpus, info = asked["gpus"], engine.info()
    tell("engine", load_seconds=info["load_seconds"], description=info["description"], logits=check_logits(engine),
         info={name: info[name] for name in ("hidden_size", "num_layers")})  # fmt: skip
    done = []
    for row in asked["rows"]:
        if time.monotonic() > until:
            tell("left_out", row=row["name"], why="no time")
            continue
        once(engine, row["batch"], NEW_TOKENS)  # warm: graphs, clocks
        seconds = spread([once(engine, row["batch"], NEW_TOKENS) for _ in range(asked["repeats"])])
        done.append(row)
        tell("row", row=row["name"], seconds=seconds, **work(engine, row["batch"], gpus))
    tell("memory", **memory_of(engine, gpus))
    for row in done if asked["split"] else ():
        if time.monotonic() > until:
            tell("left_out", row=row["name"], why="no time to take the step apart")
            continue
        try:
            ranks, before, beside = take_apart(engine, row["batch"])
        except ValueError as error:
            tell("left_out", row=row["name"], why=f"not taken apart: {error}")
            continue
        ranks_said = {rank: one.said() for rank, one in ranks.items()}
        tell("split", row=row["name"], ranks=ranks_said, seconds_before=before, seconds_beside_profiler=beside)


def main() -> None:
    asked = json.loads(sys.argv[1])
    until = time.monotonic() + asked["seconds"]
    if asked["split"]:
        watch_gpus(asked["gpus"])
    try:
        engine = open_engine(asked)
    except MemoryError as error:
        tell("left_out", row=None, why=str(error))
        return
    try:
        measure(engine, asked, until)
    finally:
        engine.close()
        gc.collect()


if __name__ == "__main__":
    main()
