"""How fast is one model over several GPUs, how far is that from what they could do, and where does a step's time go?

Random weights in the real shapes (load_format="dummy": a 72B checkpoint in 4 bits is 41 GB, so load seconds here are those of
making the weights up on the GPUs and packing them; no file is read). Decoding: 128 tokens in, 256 out, the time of a step
while all sequences decode; prompts: 2,048 tokens, from the first step to the first token; the median of the runs counts. Each
row stands beside its target and its limit: the bytes that a GPU must read in a step over its measured bandwidth, and two
all-reduces a layer and one at the end, each as long as the all-reduce program measured it for that many rows.

Each row is run once more under torch.profiler; tp_split.py says what its kernels, messages and gaps are. Together they must
agree with the step's time just before without the profiler, within --tolerance percent; otherwise the exit status is 1. Memory: the plan
of the card with the most, and what NVML counts on each.

One process with one engine for each shape, format and number of GPUs (tp_engine.py); a model that does not fit is left out
and named. --all-reduce: tests/multi_gpu/test_all_reduce as built before (it checks before it times, and compares with NCCL);
without it the limit has no time of messages. --gpus 1,2,4 and --rows choose what to run; with --save the file is written
anew after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import HERE, dummy, save
from gpu_common import Limits, gpu_environment, parser, percent
from tp_engine import NEW_TOKENS, PREFILL_TOKENS, PROMPT_TOKENS


class Row(NamedTuple):
    name: str
    shape: str
    quantization: str | None
    batch: int  # 0: a prompt


ROWS = [
    Row("72b-w4-1", "qwen2.5-72b", "w4", 1),
    Row("72b-w4-prefill", "qwen2.5-72b", "w4", 0),
    Row("7b-w4-1", "qwen2.5-7b", "w4", 1),
    Row("7b-w4-64", "qwen2.5-7b", "w4", 64),
    Row("7b-bf16-1", "qwen2.5-7b", None, 1),
]
# tokens/s that must be reached, by row and GPUs; of a gain: times as fast as one GPU; of loading: seconds at most
TARGETS = {
    ("7b-w4-1", 2): 900.0, ("7b-w4-1", 4): 1100.0, ("7b-w4-64", 4): 24000.0, ("7b-bf16-1", 1): 230.0,
    ("7b-bf16-1", 4): 600.0, ("72b-w4-1", 1): 70.0, ("72b-w4-1", 4): 200.0,
}  # fmt: skip
GAIN_TARGETS = {("72b-w4-prefill", 4): 2.8}
LOAD_TARGETS = {("qwen2.5-72b", 4): 60.0}

# -- messages ----------------------------------------------------------------------------------------------------

# "    1 x  3584      7.0 KB  one shot    2.10, with norm    2.43; two shots with norm    4.10; chosen one; NCCL ..."
MEASURED = re.compile(
    r"^ *(\d+) x +(\d+) +([\d.]+) KB  one shot +[\d.]+, with norm +([\d.]+); two shots with norm +([\d.]+); chosen (\w+)"
    r"(?:; NCCL bf16 +([\d.]+), float32 +([\d.]+), float32 then norm +([\d.]+))?"
)


def parse_messages(said: str) -> dict[tuple[int, int], dict[str, Any]]:
    """(rows, hidden_size) to microseconds, of the all-reduce program's table."""
    found = {}
    for match in filter(None, map(MEASURED.match, said.splitlines())):
        rows, hidden, kb, one, two, chosen, *nccl = match.groups()
        ours = float(one if chosen == "one" else two)
        names = ("nccl_bf16_us", "nccl_float32_us", "nccl_float32_norm_us")
        others = {name: float(value) for name, value in zip(names, nccl) if value is not None}
        ratio = {"nccl_over_ours": others["nccl_bf16_us"] / ours} if others else {}
        found[int(rows), int(hidden)] = {"bf16_kb": float(kb), "ours_us": ours, "form": chosen, **others, **ratio}
    return found


def measure_messages(program: Path, gpus: int, nccl: str | None) -> dict[tuple[int, int], dict[str, Any]]:
    command = [str(program.absolute()), str(gpus), "--bench", *(["--nccl", nccl] if nccl else [])]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{program} failed: {(done.stdout + done.stderr)[-2000:]}")
    return parse_messages(done.stdout)


def message_seconds(messages: dict[tuple[int, int], dict[str, Any]], info: dict[str, Any], rows: int) -> float | None:
    """Of a step's all-reduces, by the nearest measured number of rows that is not less."""
    fitting = sorted(count for count, hidden in messages if hidden == info["hidden_size"] and count >= rows)
    if not fitting:
        return None
    return (2 * info["num_layers"] + 1) * messages[fitting[0], info["hidden_size"]]["ours_us"] * 1e-6


# -- an engine in a process of its own ---------------------------------------------------------------------------


def lines_of(asked: dict[str, Any], limit_s: float) -> Iterator[dict[str, Any]]:
    """What tp_engine.py tells. Its other output goes to ours; it is ended after limit_s. RuntimeError where it fails."""
    command = [sys.executable, str(HERE / "tp_engine.py"), json.dumps(asked)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
    watch = threading.Timer(limit_s, child.kill)
    watch.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("TP "):
                yield json.loads(line[3:])
            else:
                print(line, end="", flush=True)
        code = child.wait()
    finally:
        watch.cancel()
        child.kill()
        child.wait()
    if code != 0:
        late = f", ended after {limit_s:.0f} s" if code == -9 else ""
        raise RuntimeError(f"the engine's process ended with {code}{late}")


class Results:
    """The rows, printed and written as they come."""

    def __init__(self, args: argparse.Namespace, limits: Limits) -> None:
        self._args, self._limits = args, limits
        self.rows: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {"limits": limits.said, "messages": {}, "left_out": [], "engines": [], "gains": []}
        self._environment = gpu_environment(args)
        gpus = self._environment["gpus"]
        self.here = len(gpus) if gpus and getattr(args, "device", "cpu") != "cpu" else None
        self.tolerance = args.tolerance / 100

    def leave_out(self, what: str, why: str) -> None:
        self.more["left_out"].append(f"{what}: {why}")
        print(f"left out: {what}: {why}", flush=True)
        self.write()

    def engine(self, shape: str, quantization: str | None, gpus: int, said: dict[str, Any]) -> dict[str, Any]:
        one = {"shape": shape, "quantization": quantization, "gpus": gpus, **said}
        target = LOAD_TARGETS.get((shape, gpus))
        more = "" if target is None else f"; must be {target:.0f} s at most"
        print(f"{shape} {quantization or 'bf16'}, {cards(gpus)}: random weights in {said['load_seconds']:.1f} s{more}; "
              f"{said['description']}; logits {said['logits']}", flush=True)  # fmt: skip
        self.more["engines"].append(one)
        return one

    def memory(self, engine: dict[str, Any], said: dict[str, Any]) -> None:
        engine["memory"] = said
        mib = 1 << 20
        counted = said["nvml_bytes"]
        nvml = "NVML not to be had" if counted is None else "NVML " + ", ".join(f"{one / mib:,.0f}" for one in counted)
        off = "" if counted is None else (
            f": {said['off_bytes'] / mib:+,.0f}, {'within' if abs(said['off_bytes']) <= said['allowed_bytes'] else 'NOT within'} "
            f"{said['allowed_bytes'] / mib:,.0f}"
        )  # fmt: skip
        print(f"  memory of a card, MiB: planned {said['planned_bytes'] / mib:,.0f} and the driver's "
              f"{said['overhead_bytes'] / mib:,.0f}, together {said['total_bytes'] / mib:,.0f}; {nvml}{off}", flush=True)  # fmt: skip
        self.write()

    def row(self, row: Row, gpus: int, said: dict[str, Any], info: dict[str, Any], messages: dict[Any, Any]) -> None:
        seconds, limits = said["seconds"]["median"], self._limits
        tokens = row.batch or PREFILL_TOKENS
        sent = message_seconds(messages, info, tokens) if gpus > 1 else 0.0
        least = max(said["bytes"] / limits.read_gbs / 1e9 if limits.read_gbs else 0.0,
                    said["flops"] / limits.gemm_tflops / 1e12 if limits.gemm_tflops else 0.0)  # fmt: skip
        target = TARGETS.get((row.name, gpus))
        found = {
            "row": row.name,
            "gpus": gpus,
            "batch": row.batch,
            "prompt_tokens": PROMPT_TOKENS if row.batch else PREFILL_TOKENS,
            "new_tokens": NEW_TOKENS if row.batch else 1,
            "seconds": said["seconds"],
            "tokens_per_s": tokens / seconds,
            "target_tokens_per_s": target,
            "limit_seconds": least + (sent or 0.0),
            "limit_messages_seconds": sent,
            **limits.shares(said["bytes"], said["flops"], seconds),
        }
        self.rows.append(found)
        rate = found["tokens_per_s"]
        must = (
            ""
            if target is None
            else f" (must {target:,.0f}: {'met' if rate >= target else f'{rate / target - 1:+.0%}'})"
        )
        print(
            f"  {row.name:15} {cards(gpus)}: {1e3 * seconds:8.3f} ms, {rate:10,.0f} tok/s{must}; limit {1e3 * found['limit_seconds']:7.3f} ms "
            f"(messages {'not measured' if sent is None else f'{1e3 * sent:.3f}'}); {percent(found['read_share'])} of reads",
            flush=True,
        )
        self._gain(row, gpus, seconds)
        self.write()

    def _gain(self, row: Row, gpus: int, seconds: float) -> None:
        alone = [one for one in self.rows if one["row"] == row.name and one["gpus"] == 1]
        if not alone or gpus == 1:
            return
        gain, target = alone[0]["seconds"]["median"] / seconds, GAIN_TARGETS.get((row.name, gpus))
        self.more["gains"].append({"row": row.name, "gpus": gpus, "times": gain, "target": target})
        must = "" if target is None else f" (must {target:g}: {'met' if gain >= target else 'missed'})"
        print(f"  {row.name:15} {cards(gpus)}: {gain:.2f} times as fast as 1 GPU{must}", flush=True)

    def split(self, name: str, gpus: int, said: dict[str, Any]) -> None:
        row = next(one for one in self.rows if one["row"] == name and one["gpus"] == gpus)
        plain_us, ranks = 1e6 * said["seconds_before"], said["ranks"]
        slowest = max(ranks, key=lambda rank: ranks[rank]["kernels_us"] + ranks[rank]["gaps_us"])
        first = next(iter(ranks))
        off = ranks[first]["step_us"] / plain_us - 1
        row["split"] = {**said, "slowest_rank": int(slowest), "off": off, "agrees": abs(off) <= self.tolerance}
        for rank in dict.fromkeys((first, slowest)):
            print_rank(rank, ranks[rank], rank == slowest and len(ranks) > 1)
        print(f"      just before without the profiler {plain_us:,.1f} us: the parts are {100 * off:+.2f} % off, "
              f"{'within' if row['split']['agrees'] else 'NOT within'} {100 * self.tolerance:g} %", flush=True)  # fmt: skip
        self.write()

    def write(self) -> None:
        save("gpu-tp", self.rows, self._args.save, self._args.results, False, **self._environment, **self.more)


def cards(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ' '}"


def print_rank(rank: str, one: dict[str, Any], slowest: bool) -> None:
    waiting = "" if one["waiting_us"] is None else f" of which waiting {one['waiting_us']:,.1f}"
    print(f"    rank {rank}{', the slowest' if slowest else ''}: {one['step_us']:,.1f} us = kernels {one['kernels_us']:,.1f} + messages "
          f"{one['messages_us']:,.1f} ({one['message_calls']:.4g} calls{waiting}) + gaps {one['gaps_us']:,.1f}")  # fmt: skip
    for name, part in list(one["parts"].items())[:10]:
        print(f"      {name[:36]:36} {part['calls']:6.4g} calls {part['us']:10,.1f} us, gaps before {part['gap_us']:8,.1f}, "
              f"beside others {part['overlapped_us']:8,.1f}")  # fmt: skip


def run_engine(results: Results, rows: list[Row], gpus: int, model: Path, left_s: float, args: argparse.Namespace,
               messages: dict[Any, Any]) -> None:  # fmt: skip
    first = rows[0]
    asked = {
        "model": str(model), "quantization": first.quantization, "gpus": gpus, "device": args.device, "repeats": args.repeats,
        "rows": [{"name": row.name, "batch": row.batch} for row in rows], "split": not args.no_split, "seconds": left_s,
    }  # fmt: skip
    by_name = {row.name: row for row in rows}
    engine: dict[str, Any] = {}
    for said in lines_of(asked, left_s + 30):
        kind = said.pop("kind")
        if kind == "engine":
            engine = results.engine(first.shape, first.quantization, gpus, said)
        elif kind == "memory":
            results.memory(engine, said)
        elif kind == "row":
            results.row(by_name[said.pop("row")], gpus, said, engine["info"], messages)
        elif kind == "split":
            results.split(said.pop("row"), gpus, said)
        else:
            names = [said["row"]] if said["row"] else list(by_name)
            for name in names:
                results.leave_out(f"{name} on {gpus}", said["why"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gpus", default="1,2,4", help="numbers of GPUs, by comma")
    arguments.add_argument("--rows", default=",".join(row.name for row in ROWS), help="by comma")
    arguments.add_argument("--all-reduce", type=Path, help="tests/multi_gpu/test_all_reduce as built before")
    arguments.add_argument("--nccl", help="libnccl.so.2, for the all-reduce program")
    arguments.add_argument(
        "--messages",
        action="append",
        default=[],
        metavar="GPUS=FILE",
        help="what the all-reduce program printed before",
    )
    arguments.add_argument(
        "--budget-seconds", type=float, default=600.0, help="begin nothing after so long (default 600)"
    )
    arguments.add_argument("--tolerance", type=float, default=5.0, help="percent (default 5)")
    arguments.add_argument("--no-split", action="store_true", help="do not take steps apart: needs no torch")
    arguments.add_argument("--device", default="cuda", help="cpu: ranks of threads, to try the program")
    args = arguments.parse_args()
    begin = time.monotonic()
    results = Results(args, Limits(args))
    counts, wanted = [int(count) for count in args.gpus.split(",")], args.rows.split(",")
    groups: dict[tuple[str, str | None], list[Row]] = {}
    for row in (row for row in ROWS if row.name in wanted):
        groups.setdefault((row.shape, row.quantization), []).append(row)
    messages: dict[int, dict[tuple[int, int], dict[str, Any]]] = {}
    earlier = dict(one.split("=", 1) for one in args.messages)
    for gpus in counts:
        if str(gpus) in earlier:
            messages[gpus] = parse_messages(Path(earlier[str(gpus)]).read_text())
        elif gpus > 1 and args.all_reduce:
            messages[gpus] = measure_messages(args.all_reduce, gpus, args.nccl)
        said = [{"rows": r, "hidden_size": h, **one} for (r, h), one in messages.get(gpus, {}).items()]
        results.more["messages"][gpus] = said
    with tempfile.TemporaryDirectory() as directory:
        for (shape, _), rows in groups.items():
            model = dummy(Path(directory) / shape, shape)
            for gpus in counts:
                what = f"{', '.join(row.name for row in rows)} on {gpus}"
                left_s = begin + args.budget_seconds - time.monotonic()
                if results.here is not None and gpus > results.here:
                    results.leave_out(what, f"this machine shows {results.here} GPU(s)")
                    continue
                if left_s <= 0:
                    results.leave_out(what, "no time")
                    continue
                try:
                    run_engine(results, rows, gpus, model, left_s, args, messages.get(gpus, {}))
                except RuntimeError as error:
                    results.leave_out(what, str(error))
    wrong = [f"{row['row']} on {row['gpus']}" for row in results.rows if not row.get("split", {}).get("agrees", True)]
    if wrong:
        sys.exit(f"kernels, messages and gaps do not add up to the step: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
