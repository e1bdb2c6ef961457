"""qwen-fast cost: its arguments, and what it does. Imports what measures when it runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from .plan_cli import PRICES

DEFAULT_TARIFF = {"¥": 0.6}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group(
        "what is measured (default: the three workloads of study A and the one of study B)"
    )
    work.add_argument(
        "--lengths",
        action="append",
        metavar="IN/OUT",
        help="own prompt and output tokens, such as 512/128; may be given again",
    )
    work.add_argument(
        "--prompts", metavar="FILE", help="JSON lines: texts, or objects with prompt, messages or prompt_token_ids"
    )
    work.add_argument(
        "--output-len", type=int, default=128, metavar="N", help="for --prompts without max_tokens (default 128)"
    )
    work.add_argument("--access-log", metavar="FILE", help="the lengths in an audit log of `serve --audit-log`")
    work.add_argument("--users", metavar="N,N,...", help="users at once (default 1,16,32; study B 1,2,4,8,16)")
    work.add_argument("--quick", action="store_true", help="short windows and requests, to see everything in a minute")
    work.add_argument("--no-levers", action="store_true", help="leave out the levers")
    work.add_argument("--no-sweep", action="store_true", help="leave out the prompt's lengths")
    work.add_argument(
        "--gpus",
        metavar="N,N,...",
        help="compare the last workload on so many GPUs (default: 1, 2, 4, 8 as this machine has them; with --device cpu ranks of threads, only where given)",
    )
    work.add_argument(
        "--gpus-users", metavar="N,N,...", help="users of that comparison (default: --users, else 1,16,32,64,128)"
    )
    work.add_argument("--budget-seconds", type=float, metavar="S", help="begin nothing new after so long (--quick: 80)")
    work.add_argument("--window-seconds", type=float, metavar="S", help="shortest window (default 2; --quick: 0.25)")
    work.add_argument(
        "--peak-bandwidth", type=float, metavar="GB/S", help="a GPU's measured read bandwidth (benchmarks/probe.cu)"
    )
    work.add_argument("--peak-flops", type=float, metavar="TFLOP/S", help="a GPU's measured rate of a matrix product")
    work.add_argument(
        "--p99", type=float, default=3.0, metavar="S", help="bound that concurrency is found for (default 3 s)"
    )
    _add_money(parser)
    _add_output(parser)


def _add_money(parser: argparse.ArgumentParser) -> None:
    money = parser.add_argument_group("money (what is not given is left out, but for the tariff in ¥ and PUE 1)")
    money.add_argument("--currency", default="¥", help="symbol (default ¥)")
    for name, text in PRICES:
        more = " (default: 0.6 in ¥, a tariff of study A)" if name == "electricity-per-kwh" else ""
        money.add_argument(f"--{name}", type=float, metavar="X", help=text + more)
    money.add_argument(
        "--tokens-per-day",
        type=float,
        default=5e6,
        metavar="N",
        help="your volume of output tokens (default 5,000,000)",
    )
    money.add_argument(
        "--wall-watts",
        action="append",
        metavar="USERS=W",
        help="what a meter at the wall read under the first workload; may be given again",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--out",
        default="cost-report",
        metavar="DIR",
        help="for report.{json,html,csv} and measurements.json, which a run that was cut off takes up (default cost-report)",
    )
    out.add_argument("--pdf", action="store_true", help="report.pdf too, where a Chromium is installed")
    out.add_argument("--json", action="store_true", help="print the JSON in place of the tables")
    out.add_argument("--fresh", action="store_true", help="take up nothing of an earlier run")
    out.add_argument(
        "--render",
        metavar="FILE",
        help="measure nothing: make the report of a report.json, or, with these prices, of a measurements.json",
    )


def run(args: argparse.Namespace) -> int:
    from .report import Report
    from .run import Runner

    if args.render is not None:
        return _show(args, _read(args))
    settings = _settings(args)
    from .. import cli
    from ..llm import LLM

    args.model = args.model_name or args.model
    path = Path(args.out, "measurements.json")
    if args.fresh:
        path.unlink(missing_ok=True)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    def load(options: Any) -> LLM:
        return LLM(args.model, progress=False, **options)

    runner = Runner(cli.engine_arguments(args), settings, load, path, say)
    return _show(args, Report.from_measurements(runner.run()))


def _read(args: argparse.Namespace) -> Any:
    """A report as it is, or measurements with the prices of the command line."""
    from .report import Report
    from .run import repriced

    data = json.loads(Path(args.render).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or "identity" not in data:
        return Report.read(args.render)
    return Report.from_measurements(repriced(data, _settings(args)))


def _show(args: argparse.Namespace, report: Any) -> int:
    from .render_pdf import find_chromium
    from .render_terminal import show

    written = report.write(args.out, pdf=args.pdf)
    if args.json:
        print(report.to_json(), end="")
    else:
        show(report.document)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    if args.pdf and find_chromium() is None:
        print("no PDF: there is no Chromium on the PATH", file=sys.stderr)
    return 0


def _settings(args: argparse.Namespace) -> Any:
    from .money import Prices
    from .settings import Settings

    fields = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name, _ in PRICES}
    default = fields["electricity_per_kwh"] is None and args.currency in DEFAULT_TARIFF
    if default:
        fields["electricity_per_kwh"] = DEFAULT_TARIFF[args.currency]
    budget = args.budget_seconds
    return Settings(
        workloads=_workloads(args),
        users=_users(args.users, "users"),
        quick=args.quick,
        budget_s=80.0 if budget is None and args.quick else budget,
        peak_gbs=args.peak_bandwidth,
        peak_tflops=args.peak_flops,
        tokens_per_day=args.tokens_per_day,
        p99_s=args.p99,
        wall_watts=_wall_watts(args.wall_watts or []),
        with_levers=not args.no_levers,
        with_sweep=not args.no_sweep,
        gpus=_users(args.gpus, "gpus"),
        gpus_users=_users(args.gpus_users, "gpus-users"),
        window_s=args.window_seconds,
        prices=Prices(args.currency, **fields, electricity_is_default=default),
    )


def _workloads(args: argparse.Namespace) -> tuple[Any, ...] | None:
    from .workloads import from_access_log, from_jsonl, parse_lengths

    found = [parse_lengths(text) for text in args.lengths or ()]
    if args.prompts is not None:
        found.append(from_jsonl(args.prompts, args.output_len))
    if args.access_log is not None:
        found.append(from_access_log(args.access_log))
    return tuple(found) or None


def _users(text: str | None, name: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--{name} must be numbers of at least 1, such as 1,2,4, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def _wall_watts(given: list[str]) -> dict[int, float]:
    found = {}
    for text in given:
        users, sign, watts = text.partition("=")
        try:
            found[int(users)] = float(watts)
        except ValueError:
            sign = ""
        if not sign:
            raise ValueError(f"--wall-watts must be USERS=W, such as 16=880, got {text!r}")
    return found
