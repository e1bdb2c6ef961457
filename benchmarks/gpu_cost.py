"""A full cost report of a shape with random weights, 4 bits in groups of 128, on this GPU: what `qwen-fast cost` measures,
with the peaks of this very GPU measured just before (gpu_common.Limits).

    python benchmarks/gpu_cost.py --only 7B --out results/cost-7B --budget-seconds 170

    python benchmarks/gpu_cost.py --only 7B --gpus 1,2 --out results/cost-7B-gpus --budget-seconds 105

--gpus: nothing but study B's question, one GPU against several: its workload (2,048 tokens in, 512 out) with 1 to 128 users on
each number of GPUs, energy summed over them; comparison.md has the tables. Give a folder of its own, whose name ends with -gpus.

Run again with the same --out it takes up what is there and measures the rest, more numbers of GPUs too. Writes measurements.json and report.json;
`qwen-fast cost --render measurements.json --out DIR --rent-per-hour 3 ...` makes the report with prices anywhere.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import dummy
from gpu_common import SHAPES, Limits, gpu_environment, parser

GROUP = 128


def limits(args: Any, out: Path) -> dict[str, Any]:
    """Measured once for a folder and a kind of GPU: a run that goes on keeps the peaks of its beginning."""
    path = out / "peaks.json"
    environment = gpu_environment(args)
    if path.is_file() and args.read_gbs is None and args.gemm_tflops is None:
        earlier = json.loads(path.read_text())
        if kinds(earlier) == kinds(environment):
            return earlier
        print(f"{path} is of another GPU; its peaks are measured anew", file=sys.stderr)
    # In a process of its own: what torch keeps on the GPU would be in the report's memory figures.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        said = {**pool.submit(measure_limits, args).result(), **environment}
    path.write_text(json.dumps(said, indent=1, default=str))
    return said


def measure_limits(args: Any) -> dict[str, Any]:
    found = Limits(args)
    return {"read_gbs": found.read_gbs, "gemm_tflops": found.gemm_tflops, "said": found.said}


def kinds(environment: Any) -> list[Any]:
    return [(gpu["name"], gpu["total_bytes"]) for gpu in environment["gpus"] or ()]


def comparison(report: Any, name: str, group: int) -> str:
    """The comparison's tables, and the study's, as Markdown."""
    from qwen_fast.cost import beside
    from qwen_fast.cost.render_markdown import markdown

    document = report.document
    machine = document["machine"]
    where = machine["gpus"][0]["name"] if machine["gpus"] else machine["cpu"]
    text = (
        f"4 bits in groups of {group}, 16-bit head, random weights in the real shape; `{machine['command']}`, begun {document['began']}, qwen_fast "
        f"{machine['qwen_fast']}. Steady state of a closed loop, 95 % intervals in report.json; power is that of the GPUs in use."
    )
    lines = [f"# Qwen2.5-{name} on one {where} and on several", "", text]
    for one in (*map(report.table, ("gpus-summary", "gpus-loads")), *beside.comparison(document)):
        if one["id"] in ("gpus-summary", "gpus-loads", "study-b-gpus"):
            lines += markdown(one)
    lines += ["", *(f"- {note}" for note in document["notes"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--out", type=Path, required=True, help="folder for the report and what is measured")
    options.add_argument(
        "--budget-seconds", type=float, default=170.0, help="begin nothing new after so long (default 170)"
    )
    options.add_argument("--window-seconds", type=float, default=0.8, help="shortest window of a load (default 0.8)")
    options.add_argument("--device", default="cuda")
    options.add_argument("--quick", action="store_true", help="short windows and requests")
    options.add_argument("--gpus", help="compare these numbers of GPUs, by comma, and measure nothing else")
    options.add_argument(
        "--users", default="1,16,32,64,128", help="of that comparison, by comma (default 1,16,32,64,128)"
    )
    args = options.parse_args()
    began = time.monotonic()
    from qwen_fast import LLM
    from qwen_fast.cost.report import Report
    from qwen_fast.cost.run import Runner, Settings
    from qwen_fast.cost.workloads import STUDY_B

    name = args.only or "0.5B"
    args.out.mkdir(parents=True, exist_ok=True)
    peaks = limits(args, args.out)
    gpu = args.device != "cpu"
    one_question: dict[str, Any] = {}
    if args.gpus:
        gpus, users = (tuple(int(one) for one in text.split(",")) for text in (args.gpus, args.users))
        one_question = {
            "workloads": (STUDY_B,), "users": users, "gpus": gpus, "windows": 3, "with_levers": False, "with_sweep": False,
        }  # fmt: skip
    settings = Settings(
        quick=args.quick,
        budget_s=max(1.0, args.budget_seconds - (time.monotonic() - began)),
        window_s=args.window_seconds,
        peak_gbs=peaks["read_gbs"] if gpu else None,
        peak_tflops=peaks["gemm_tflops"] if gpu else None,
        peak_source="measured on this GPU before the loads: reads by benchmarks/probe.cu, bf16 products by torch.matmul",
        **one_question,
    )
    engine = {"device": args.device, "load_format": "dummy", "quantization": "w4", "quantization_group_size": GROUP}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        model = dummy(Path(directory) / name, SHAPES[name])

        def load(changes: Any) -> Any:
            return LLM(str(model), progress=False, **changes)

        shown = f"Qwen2.5-{name} (shape, random weights)"
        data = Runner(engine, settings, load, args.out / "measurements.json", say, name=shown).run()
    report = Report.from_measurements(data)
    (args.out / "report.json").write_text(report.to_json())
    if args.gpus:
        report.write(args.out)
        (args.out / "comparison.md").write_text(comparison(report, name, GROUP), encoding="utf-8")
    left = sum("time budget" in why for why in data["skipped"].values())
    print(
        f"{args.out}: {len(data['stages'])} stages measured, {left} left for another run, {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
