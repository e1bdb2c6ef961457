"""qwen-fast quality: its arguments, and what it does. Imports what measures when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Options of number formats: the reference has its own.
_FORMATS = ("dtype", "quantization", "quantization_group_size", "activation_dtype", "kv_cache_dtype", "kv_cache_16bit_window",
            "kv_cache_16bit_layers", "lm_head_dtype", "cpu_offload", "cpu_offload_gb")  # fmt: skip
_SIZES = ("kv_cache_memory", "kv_cache_tokens", "memory_utilization", "gpu_memory_utilization", "memory")
_CACHE_TOKENS = 32_768  # of each engine where nobody says: two of them must fit
_QUICK = {"tokens": 4096, "limit": 4, "draws": 2000, "window": 512}


def add_arguments(
    parser: argparse.ArgumentParser, engine: Sequence[tuple[str, Any, str]], metavar: Mapping[Any, str]
) -> None:
    """engine: the table of the engine's options."""
    what = parser.add_argument_group("what is compared (default: the model as it is loaded with these engine options)")
    what.add_argument(
        "--against", metavar="REF", help="the reference: demo, a directory or a hub id (default: MODEL at 16 bits)"
    )
    what.add_argument(
        "--matrix", action="append", metavar="AXES",
        help='every combination, such as "weights=auto,w4 head=16,8,4 kv=auto,fp8_e4m3,int8,int4,nf4"; may be given again. Axes: '
        "weights (a format, or a checkpoint), head, kv, activations, and any engine option by name",
    )  # fmt: skip
    what.add_argument(
        "--cells",
        action="append",
        metavar="AXES",
        help='only cells that agree, such as "kv=int4,nf4"; may be given again',
    )
    what.add_argument("--budget-seconds", type=float, metavar="S", help="begin no cell after so long")
    data = parser.add_argument_group(
        "with what (default: the text and the tasks in the package, made for the demo model)"
    )
    data.add_argument("--text", metavar="FILE", help="a text, UTF-8")
    data.add_argument(
        "--tasks", metavar="FILE", help="JSON lines: task, messages, answer; optional tools, schema, kind, distance"
    )
    data.add_argument("--no-text", action="store_true", help="tasks only")
    data.add_argument("--no-tasks", action="store_true", help="text only")
    data.add_argument("--only", metavar="TASK,...", help="these tasks only")
    data.add_argument("--limit", type=int, metavar="N", help="rows of each task, at most")
    data.add_argument("--tokens", type=int, metavar="N", help="tokens of the text, at most")
    data.add_argument(
        "--quick", action="store_true", help="4 rows of each task and 4,096 tokens, to see everything soon"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--window", type=int, metavar="N", help="tokens of a window of text (default 1024; --quick: 512)")
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer, at most (default 1200)")
    how.add_argument("--draws", type=int, metavar="N", help="of the bootstrap (default 10,000; --quick: 2,000)")
    how.add_argument(
        "--bootstrap-seed", type=int, metavar="N", help="the same seed gives the same intervals (default 1)"
    )
    how.add_argument(
        "--reference-logits", metavar="HOW",
        help="both (models loaded at once), file (the reference first, its logits in a temporary file, float32), file16 (half "
        "the space, rounded), auto",
    )  # fmt: skip
    how.add_argument("--spool-folder", metavar="DIR", help="for that file (default: the system's)")
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--out", default="quality-report", metavar="DIR", help="for report.{json,html} (default quality-report)"
    )
    out.add_argument("--json", action="store_true", help="print the JSON in place of the tables")
    out.add_argument("--render", metavar="FILE", help="measure nothing: show and write the report of a report.json")
    out.add_argument(
        "--max-kl",
        type=float,
        metavar="X",
        help="exit code 1 where a cell's mean KL divergence is above X, or a cell is not measured",
    )
    group = parser.add_argument_group("the reference's engine (what is not a number format is as for MODEL)")
    for name, kind, text in engine:
        group.add_argument(f"--against-{name}", type=kind, help=text.replace("%", "%%"), metavar=metavar[kind])


def run(args: argparse.Namespace) -> int:
    from .report import Report

    if args.max_kl is not None and not args.max_kl >= 0:
        raise ValueError(f"--max-kl must be a number of at least 0, got {args.max_kl}")
    _check_out(Path(args.out))
    if args.render is not None:
        return _show(args, Report.read(args.render))
    from .. import cli
    from ..cost.machine import machine
    from .run import Runner
    from .tasks import TEXT_FILE, read_rows, select

    kinds = {name.replace("-", "_"): kind for name, kind, _ in cli._ENGINE}
    model = args.model_name or args.model
    options = _sized(cli.engine_arguments(args))
    against = {name: value for name in kinds if (value := getattr(args, f"against_{name}")) is not None}
    reference = args.against or model
    base = reference_options(options, against, same_checkpoint=args.against is None)
    settings = _settings(args)
    cells, alone = _cells(args, model, options, kinds)
    text = None if args.no_text else _read_text(args.text or TEXT_FILE)
    rows = [] if args.no_tasks else select(read_rows(args.tasks), settings.limit, settings.only)
    began = time.monotonic()
    where: dict[str, Any] = {}

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {text}", file=sys.stderr, flush=True)

    def load() -> Any:
        from .scorer import EngineScorer

        scorer = EngineScorer(reference, base)
        where.update(machine(scorer.llm), command=shown_command(sys.argv))
        return scorer

    fits = len(cells) == 1 and _fit(reference, base, model, options)
    runner = Runner(load, cells, settings, text, rows, fits=fits, alone=alone, say=say)
    data = runner.run()
    data["settings"] |= {
        "text": "the package's heldout.txt" if args.text is None else Path(args.text).name,
        "tasks": "the package's eval.jsonl" if args.tasks is None else Path(args.tasks).name,
        "spool_folder": None if args.spool_folder is None else Path(args.spool_folder).name,
    }
    return _show(args, Report.from_measurements(data | {"machine": where}))


def _check_out(folder: Path) -> None:
    """ValueError where a report cannot be written there: before anything is measured."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"--out {folder}: {there} is no directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out {folder}: {there} cannot be written")
    for name in ("report.json", "report.html"):
        if (folder / name).is_dir():
            raise ValueError(f"--out {folder}: {name} in it is a directory")


def reference_options(options: Mapping[str, Any], against: Mapping[str, Any], same_checkpoint: bool) -> dict[str, Any]:
    """The reference's engine options: 16 bits and more, unless `against` says otherwise; what is no number format is as
    in `options`."""
    base = {name: value for name, value in options.items() if name not in _FORMATS}
    if not same_checkpoint:
        for name in ("tokenizer", "chat_template", "revision"):
            base.pop(name, None)
    device = against.get("device", options.get("device", "auto"))
    base |= {"lm_head_dtype": "model", "kv_cache_dtype": "bfloat16"}
    base |= {"dtype": "bfloat16"} if _on_gpu(device) else {"dtype": "float32", "activation_dtype": "float32"}
    if any(name in against for name in _SIZES):
        for name in _SIZES:
            base.pop(name, None)
    return base | dict(against)


def shown_command(argv: Sequence[str]) -> str:
    """The command line without folders: reports are passed on."""
    shown = [Path(argv[0]).name]
    for part in argv[1:]:
        head, sign, value = part.partition("=") if part.startswith("--") else ("", "", part)
        if "/" in value and " " not in value and "," not in value:
            value = Path(value).name
        elif "/" in value:
            value = " ".join(
                name + equals + ",".join(one.rstrip("/").rpartition("/")[2] for one in values.split(","))
                for name, equals, values in (text.partition("=") for text in value.split())
            )
        shown.append(head + sign + value)
    return " ".join(f"'{part}'" if " " in part else part for part in shown)


def _on_gpu(device: str) -> bool:
    if device != "auto":
        return device.partition(":")[0] == "cuda"
    from ..native import _engine

    return any(gpu["usable"] for gpu in _engine.device_info())


def _sized(options: dict[str, Any]) -> dict[str, Any]:
    return options if any(name in options for name in _SIZES) else options | {"kv_cache_tokens": _CACHE_TOKENS}


def _settings(args: argparse.Namespace) -> Any:
    from .run import Settings

    given = {
        "window": args.window, "tokens": args.tokens, "limit": args.limit, "max_new_tokens": args.max_new_tokens,
        "draws": args.draws, "seed": args.bootstrap_seed, "reference_logits": args.reference_logits,
        "only": None if args.only is None else tuple(args.only.split(",")),
        "spool_folder": args.spool_folder, "budget_s": args.budget_seconds,
    }  # fmt: skip
    values = {**(_QUICK if args.quick else {}), **{name: value for name, value in given.items() if value is not None}}
    return Settings(quick=args.quick, **values)


def _cells(
    args: argparse.Namespace, model: str, options: Mapping[str, Any], kinds: Mapping[str, Any]
) -> tuple[list[Any], bool]:
    """The cells, and whether one was asked for rather than a matrix."""
    from .matrix import Spot, parse_axes, spots
    from .run import Cell
    from .scorer import EngineScorer, model_name, shown_options

    if args.matrix is None:
        if args.cells is not None:
            raise ValueError("--cells chooses among the cells of --matrix, which is not given")
        shown = {name: value for name, value in shown_options(options).items() if name not in _SIZES}
        label = ", ".join([model_name(model), *(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())])
        found = [Spot(label, {}, None, {})]
    else:
        found = spots(parse_axes(args.matrix, kinds), args.cells or (), kinds)
        if not found:
            raise ValueError(f"--cells {' '.join(args.cells)!r} leaves no cell of the matrix")

    def load(spot: Spot) -> Any:
        return EngineScorer(spot.model or model, {**options, **spot.options})

    return [Cell(one.label, one.axes, partial(load, one)) for one in found], args.matrix is None


def _fit(reference: str, base: Mapping[str, Any], model: str, options: Mapping[str, Any]) -> bool:
    """Whether both engines have room at once, by the engine's own estimate; False where it cannot say."""
    from ..hub import resolve_model
    from ..native import _engine
    from ..options import engine_options

    taken, available = 0, None
    for name, given in ((reference, base), (model, options)):
        given = dict(given)
        folders = {key: given.pop(key, None) for key in ("revision", "download_dir")}
        for key in ("tokenizer", "chat_template"):
            given.pop(key, None)
        try:
            memory: Mapping[str, Any] = _engine.estimate(resolve_model(name, **folders), **engine_options(**given))
        except (ValueError, NotImplementedError, RuntimeError, OSError, MemoryError):
            return False
        taken += sum(memory[f"{part}_bytes"] for part in ("embedding", "layers", "head", "workspace", "kv_cache"))
        available = memory["available_bytes"] if available is None else min(available, memory["available_bytes"])
    return available is not None and taken < 0.9 * available


def _read_text(path: str | Path) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{Path(path).name}: not UTF-8: {error}") from None
    if not text:
        raise ValueError(f"{Path(path).name} is empty; --no-text measures the tasks alone")
    return text


def _show(args: argparse.Namespace, report: Any) -> int:
    from .render_terminal import show

    written = report.write(args.out)
    if args.json:
        print(json.dumps(report.document, ensure_ascii=False))
    else:
        show(report.document)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    return _gate(report.document, args.max_kl)


def _gate(document: Mapping[str, Any], max_kl: float | None) -> int:
    if max_kl is None:
        return 0
    code = 0
    for one in document["cells"]:
        found = one.get("text", {}).get("kl_mean", {}).get("value")
        if found is None or found > max_kl:
            said = (
                f"mean KL divergence {found:.4g} is above {max_kl:g}"
                if found is not None
                else "no KL divergence was measured"
            )
            print(f"qwen-fast: {one['label']}: {said}", file=sys.stderr)
            code = 1
    return code
