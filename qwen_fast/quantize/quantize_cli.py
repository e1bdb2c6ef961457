"""qwen-fast quantize: its arguments, and what it does. Imports the quantisers when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a 16-bit checkpoint: a directory or a hub id")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    parser.add_argument("--method", required=True, metavar="NAME", help="awq, gptq, or rtn (round to nearest)")
    kind = parser.add_argument_group("what is written")
    kind.add_argument(
        "--format",
        metavar="NAME",
        help="awq, gptq, compressed-tensors (default: awq, gptq, compressed-tensors by method)",
    )
    kind.add_argument("--bits", type=int, default=4, metavar="N", help="4 or 8 (default 4)")
    kind.add_argument("--group-size", type=int, default=128, metavar="N", help="32, 64, 128, -1: a row (default 128)")
    zero = kind.add_mutually_exclusive_group()
    zero.add_argument(
        "--symmetric",
        dest="symmetric",
        action="store_true",
        default=None,
        help="no zero points (default, but for awq files)",
    )
    zero.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", help="zero points: more exact, read by fewer programs"
    )
    kind.add_argument(
        "--head-bits", type=int, default=16, metavar="N", help="8: the output head in 8 bits (default 16)"
    )
    kind.add_argument(
        "--act-order", metavar="NAME", help="of gptq: weight (default), group (groups by activation: desc_act), none"
    )
    kind.add_argument("--damp", type=float, default=0.01, metavar="X", help="of gptq: damping (default 0.01)")
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration",
        metavar="FILE",
        help='.txt, or .jsonl with "text", "messages" or "token_ids" (default: built in)',
    )
    text.add_argument("--num-samples", type=int, default=128, metavar="N", help="blocks of text (default 128)")
    text.add_argument("--sample-tokens", type=int, default=512, metavar="N", help="tokens in a block (default 512)")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda, cuda:1")
    where.add_argument(
        "--dtype", default="auto", metavar="TEXT", help="of the forward pass: float32 (default on the CPU), bfloat16"
    )
    where.add_argument("--num-threads", type=int, default=0, metavar="N", help="CPU threads (default: all)")
    where.add_argument("--restart", action="store_true", help="do not go on from an interrupted run: begin anew")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    from .run import quantize
    from .work import SUFFIX

    names = ("method", "format", "bits", "group_size", "symmetric", "act_order", "head_bits", "damp", "calibration",
             "num_samples", "sample_tokens", "device", "dtype", "num_threads", "restart")  # fmt: skip
    try:
        report = quantize(args.model, args.out, **{name: getattr(args, name) for name in names})
    except KeyboardInterrupt:
        work = Path(args.out.rstrip("/") + SUFFIX)
        again = f"; the same command goes on from {work}" if work.expanduser().is_dir() else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps(report))
        return 0
    for line in summary(report):
        print(line)
    return 0


def summary(report: dict[str, Any]) -> list[str]:
    from ..utils import format_bytes

    phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report["seconds_by_phase"].items())
    size = "rows" if report["group_size"] == -1 else f"groups of {report['group_size']}"
    zero = "symmetric" if report["symmetric"] else "asymmetric"
    device = f", {format_bytes(report['peak_device_bytes'])} on the GPU" if report["peak_device_bytes"] else ""
    own = "not measured" if report["peak_host_bytes"] is None else format_bytes(report["peak_host_bytes"])
    lines = [
        f"{report['out']}: {report['method']}, {report['bits']} bits, {size}, {zero}, format {report['format']}",
        (
            f"{format_bytes(report['source_bytes'])} to {format_bytes(report['bytes'])} in {report['seconds']:.1f} s "
            f"({phases}), {report['calibration_tokens']:,} tokens of calibration"
        ),
        f"peak memory: {own} on the host ({format_bytes(report['peak_resident_bytes'])} with the pages of mapped files){device}",
    ]
    if report["resumed_at_layer"]:
        lines.append(f"went on at layer {report['resumed_at_layer']} of an interrupted run")
    return lines
