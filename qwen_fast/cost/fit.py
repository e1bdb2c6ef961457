"""Makes coefficients.json from the committed measurements: python -m qwen_fast.cost.fit [--results benchmarks/results].

Three stages, all least squares of relative errors.

1. Linears. The times of single layers' linears (gpu-linears) by bits of the weights and kernel: microseconds for each
   kernel and token, share of the data sheet's bandwidth and of its product rate. All of them are used.
2. Steps. Those linears as they are, and one factor for each other term, at or above what its limit allows (no byte faster
   than the bandwidth probe, no product faster than the product probe). Fixed, not fitted: the step's beginning and end (from
   gpu-timeline), and the cache's bytes in the one-sequence kernel (read like its weights).
3. Requests (fit_serving.py): from the committed cost reports.

Held out, by rule, and never seen by stage 2: every other batch size (sorted; the second, the fourth, ...), and the 7B
shape's rows of 32K tokens (decode and prefill). Only the newest file of each question counts: older ones were measured on
older code. A newer file's rows replace an older one's of the same case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cards import CARDS
from .fit_parallel import fit_parallel
from .fit_serving import COMPARISON, describe_serving, fit_serving, reports, serving_rows
from .memory import Formats, packed_bytes
from .roofline import COEFFICIENTS, FAMILIES, Step, family, features, linear_us
from .shapes import find_shape

CARD = CARDS["H200"]
HELD_CONTEXT = 8192  # of the 7B shape, rows beyond it are held out
BOUNDED = ("kv_graph", "activations", "logits")  # terms that are bytes over bandwidth
FITTED = ("layers_one", "linears_one", "layers_graph", "layer_tokens_chunk", "attention", *BOUNDED)


# --- the measurements ---------------------------------------------------------------------------------------


def newest(results: Path, what: str) -> tuple[Path, dict[str, Any]]:
    """The newest file of a question. ValueError where there is none."""
    found = sorted(results.glob(f"????-??-??-{what}.json"))
    if not found:
        raise ValueError(f"{results}: no file named <date>-{what}.json")
    return found[-1], json.loads(found[-1].read_text(encoding="utf-8"))


def step_rows(results: Path) -> list[dict[str, Any]]:
    """Decode steps and prompts: what, seconds, shape, formats, steps, held."""
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for what in ("gpu-timeline", "gpu-decode", "gpu-decode-batch1"):
        path, data = newest(results, what)
        for row in data["rows"]:
            context = row.get("prompt_tokens", 128) + row.get("new_tokens", 256) / 2
            key = (row["model"], row["head"], row["batch"], context)
            cases[key] = {"seconds": row["step_seconds"]["median"], "file": path.name}
    batches = sorted({key[2] for key in cases})
    held_batches = set(batches[1::2])
    rows = []
    for (model, head, batch, context), case in sorted(cases.items()):
        held = batch in held_batches or (model == "7B" and context > HELD_CONTEXT)
        formats = Formats(4, 16 if head == "model" else int(head.removeprefix("int")))
        steps = [Step(batch, batch, context, True, batch)]
        what = f"decode {model}, {formats.head_bits}-bit head, batch {batch}, at {context:g}"
        rows.append({**case, "what": what, "kind": "decode", "model": model, "formats": formats, "steps": steps,
                     "batch": batch, "context": context, "held": held})  # fmt: skip
    path, data = newest(results, "gpu-prefill")
    for row in data["rows"]:
        tokens, chunk = row["prompt_tokens"], row["chunk"]
        ends = [*range(chunk, tokens, chunk), tokens]
        sizes = [end - begin for begin, end in zip([0, *ends], ends)]
        steps = [Step(n, 1, end, False, 1 if end == tokens else 0) for n, end in zip(sizes, ends)]
        bits = 4 if row["quantization"] == "w4" else 16
        rows.append({"seconds": row["seconds"]["median"], "file": path.name, "kind": "prefill", "model": row["model"],
                     "what": f"prefill {row['model']}, {tokens} tokens", "formats": Formats(bits, 16), "steps": steps,
                     "tokens": tokens, "chunk": chunk,
                     "held": row["model"] == "7B" and tokens > HELD_CONTEXT})  # fmt: skip
    return rows


# --- least squares ------------------------------------------------------------------------------------------


def pattern_search(loss: Callable[[list[float]], float], start: Sequence[float]) -> list[float]:
    """Parameters above 0 that make the loss least: each is stretched and shrunk in turn, by ever less."""
    best, at, stretch = loss(list(start)), list(start), 1.5
    while stretch > 1.0005:
        moved = False
        for i, by in itertools.product(range(len(at)), (stretch, 1 / stretch)):
            tried = [value * by if j == i else value for j, value in enumerate(at)]
            value = loss(tried)
            if value < best - 1e-12:
                best, at, moved = value, tried, True
        if not moved:
            stretch = math.sqrt(stretch)
    return at


def bounded_least_squares(rows: list[list[float]], wanted: list[float], bounds: list[float]) -> list[float]:
    """Factors x >= bounds that bring the rows' sums nearest to `wanted`: all ways to hold some at their bounds are tried."""
    import numpy

    a, b, low = numpy.array(rows), numpy.array(wanted), numpy.array(bounds)
    best: tuple[float, Any] = (math.inf, low)
    for held in itertools.product((False, True), repeat=len(bounds)):
        fixed = numpy.array(held)
        x = low.copy()
        if not fixed.all():
            x[~fixed] = numpy.linalg.lstsq(a[:, ~fixed], b - a[:, fixed] @ low[fixed], rcond=None)[0]
        if (x < low - 1e-9).any():
            continue
        loss = float(((a @ x - b) ** 2).sum())
        if loss < best[0] - 1e-12:
            best = (loss, x)
    return [float(value) for value in best[1]]


# --- the two stages -----------------------------------------------------------------------------------------


def fit_linears(results: Path, read_limit: float, product_limit: float) -> dict[str, Any]:
    """By bits and kernel: kernel_us, token_us, read_efficiency, product_efficiency, and the error of the fit."""
    _, data = newest(results, "gpu-linears")
    found: dict[str, Any] = {}
    for bits in (4, 8, 16):
        found[str(bits)] = {}
        for kind, _ in FAMILIES:
            points: list[tuple[float, float, int, float]] = []
            for row in data["rows"]:
                if family(row["tokens"]) == kind:
                    shape, tokens = find_shape(row["model"]), row["tokens"]
                    size = sum(packed_bytes(n, k, bits) for _, n, k in shape.linears)
                    flops = 2.0 * shape.layer_parameters * tokens
                    points.append((size, flops, tokens, row["us"][f"{bits} bits"]))
            found[str(bits)][kind] = _fit_linear(points, kind, read_limit, product_limit)
    return found


def _fit_linear(
    points: list[tuple[float, float, int, float]], kind: str, read: float, product: float
) -> dict[str, float]:
    names = ("kernel_us", "read_efficiency", "product_efficiency", "token_us")
    count = 3 if kind == "many" else 4  # its tiles hold all tokens that it is made for: nothing more for each

    def named(at: Sequence[float]) -> dict[str, float]:
        values = dict(zip(names, [*at, 0.0][: len(names)]))
        return {**values, "read_efficiency": min(values["read_efficiency"], read),
                "product_efficiency": min(values["product_efficiency"], product)}  # fmt: skip

    def errors(at: Sequence[float]) -> list[float]:
        c = named(at)
        return [math.log(linear_us(c, 4, s, f, t, CARD, kind == "many") / us) for s, f, t, us in points]

    best = pattern_search(lambda at: sum(e * e for e in errors(at)), [1.0, 0.7, 0.5, 0.02][:count])
    rms = math.sqrt(sum(e * e for e in errors(best)) / len(points))
    return {name: round(value, 6) for name, value in {**named(best), "rms_error": rms}.items()}


def step_us(results: Path) -> float:
    """What a step of one sequence takes besides its one kernel: all other kernels and gaps, mean over the shapes."""
    _, data = newest(results, "gpu-timeline")
    outside = []
    for row in data["rows"]:
        if row["batch"] == 1:
            kernels = row["kernels"]
            alone = sum(k["us"] for k in kernels if "decode_kernel" not in k["kernel"])
            outside.append(alone + sum(k["gap_us"] for k in kernels))
    if not outside:
        raise ValueError("gpu-timeline: no row of batch 1")
    return sum(outside) / len(outside)


def fit(results: Path) -> dict[str, Any]:
    """All coefficients, what they were made from, and how far they are off."""
    _, decode = newest(results, "gpu-decode")
    _, prefill = newest(results, "gpu-prefill")
    read_limit = decode["environment"]["limits"]["read_gbs"] / CARD.bandwidth_gbs
    product_limit = prefill["environment"]["limits"]["gemm_tflops"] / CARD.tflops
    fitted: dict[str, Any] = {"linears": fit_linears(results, read_limit, product_limit)}
    fitted["probe_product_efficiency"] = round(product_limit, 6)
    rows = step_rows(results)
    fixed = {"step": step_us(results), "linears_graph": 1.0, "linears_chunk": 1.0, "head": 1.0,
             "kv_one": 1 / fitted["linears"]["4"]["stream"]["read_efficiency"]}  # fmt: skip
    lows = {name: 1 / read_limit if name in BOUNDED else 1 / product_limit if name == "attention" else 0.0
            for name in FITTED}  # fmt: skip
    system: list[list[float]] = []
    wanted: list[float] = []
    for row in rows:
        row["sums"] = summed(row, fitted)
        if not row["held"]:  # every row as a share of its measured time
            us = row["seconds"] * 1e6
            wanted.append(1 - sum(row["sums"].get(name, 0.0) * value for name, value in fixed.items()) / us)
            system.append([row["sums"].get(name, 0.0) / us for name in FITTED])
    factors = fixed | dict(zip(FITTED, bounded_least_squares(system, wanted, [lows[name] for name in FITTED])))
    fitted["factors"] = {name: round(value, 6) for name, value in factors.items()}
    found = describe(rows, factors)
    served = serving_rows(results)
    fitted["factors"] |= fit_serving(served, fitted, CARD, read_limit, bounded_least_squares)
    found["serving"] = describe_serving(served, fitted, CARD)
    ratios = [1 + one["error"] for one in found["serving"] if one["held_out"]]
    found["error"]["serving_held_out_worst"] = max((abs(ratio - 1) for ratio in ratios), default=0.0)
    widest = max([found["error"]["held_out_factor"], *(max(ratio, 1 / ratio) for ratio in ratios)])
    found["error"]["held_out_factor"] = round(widest, 6)
    several = [row["workload"] for row in served if row["workload"].users > 1]
    found["contexts"]["several"] = max(
        [found["contexts"]["several"], *(w.tokens_in + w.tokens_out / 2 for w in several)]
    )
    fitted["parallel"] = fit_parallel(results, fitted, CARD, newest)
    return fitted | found | sources(results)


def summed(row: dict[str, Any], fitted: dict[str, Any]) -> dict[str, float]:
    """The terms of all steps of a row, each with a factor of 1."""
    sums: dict[str, float] = {}
    for step in row["steps"]:
        for name, value in features(find_shape(row["model"]), row["formats"], step, CARD, fitted).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def describe(rows: list[dict[str, Any]], factors: dict[str, float]) -> dict[str, Any]:
    """Every row beside its prediction, and the errors."""
    residuals = []
    for row in rows:
        predicted = sum(value * factors.get(name, 1.0) for name, value in row["sums"].items())
        residuals.append({"what": row["what"], "file": row["file"], "held_out": row["held"],
                          "measured_us": round(row["seconds"] * 1e6, 3), "predicted_us": round(predicted, 3),
                          "error": round(predicted / (row["seconds"] * 1e6) - 1, 6)})  # fmt: skip

    def worst(held: bool) -> float:
        return max(abs(one["error"]) for one in residuals if one["held_out"] is held)

    ratios = [1 + one["error"] for one in residuals if one["held_out"]]

    contexts: dict[str, float] = {"one": 0.0, "several": 0.0}
    for row in rows:
        if row["kind"] == "decode":
            many = "one" if row["batch"] == 1 else "several"
            contexts[many] = max(contexts[many], row["context"])
    return {
        "card": CARD.name,
        "contexts": contexts,
        "shapes": sorted({row["model"] for row in rows}),
        "weight_bits": sorted({row["formats"].weight_bits for row in rows}),
        "head_bits": sorted({row["formats"].head_bits for row in rows}),
        "error": {
            "fitted_worst": worst(False),
            "held_out_worst": worst(True),
            "held_out_factor": round(max(max(ratio, 1 / ratio) for ratio in ratios), 6),
        },
        "residuals": residuals,
    }


def sources(results: Path) -> dict[str, Any]:
    """The files, and the driver's share of the memory: the largest that was seen."""
    used = []
    for what in (
        "gpu-linears",
        "gpu-decode",
        "gpu-decode-batch1",
        "gpu-timeline",
        "gpu-prefill",
        "gpu-memory",
        "gpu-tp",
    ):
        path, data = newest(results, what)
        environment = data["environment"]
        used.append({"file": path.name, "commit": environment["commit"], "date": environment["date"]})
    for path in reports(results):
        commit = json.loads(path.with_name("peaks.json").read_text(encoding="utf-8"))["commit"]
        date = json.loads(path.read_text(encoding="utf-8"))["began"]
        used.append({"file": path.relative_to(results).as_posix(), "commit": commit, "date": date})
    _, memory = newest(results, "gpu-memory")
    overhead = max(row["overhead_bytes"] for row in memory["rows"])
    return {"overhead_bytes": overhead, "total_bytes": memory["environment"]["gpus"][0]["total_bytes"], "sources": used,
            "power": measured_power(results)}  # fmt: skip


def measured_power(results: Path) -> list[dict[str, Any]]:
    """From committed cost reports (schema.json): by file the GPU, the model, and the least and most watts over the loads."""
    found = []
    for path in [*sorted(results.glob("*.json")), *sorted(results.glob("*/report.json"))]:
        if path.parent.name.endswith(COMPARISON):
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or "sections" not in data or not data["machine"]["gpus"]:
            continue
        tables = [table for section in data["sections"] if section["id"] == "power" for table in section["tables"]]
        rows = [row for table in tables if any(c["key"] == "watts" for c in table["columns"]) for row in table["rows"]]
        # Not the idle readings, and not a wall meter's, which are of the whole machine.
        loads = [row["cells"] for row in rows if "gross" in row["cells"] and "wall meter" not in row["window"]]
        watts = [value for cells in loads if (value := cells["watts"]["value"]) is not None]
        if watts:
            gpu, model = data["machine"]["gpus"][0]["name"], data["model"]["name"]
            file = path.relative_to(results).as_posix()
            found.append({"file": file, "gpu": gpu, "model": model, "least": min(watts), "most": max(watts)})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qwen_fast.cost.fit", description="Makes coefficients.json.")
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--results", type=Path, default=root / "benchmarks" / "results", help="the measurements")
    parser.add_argument("--output", type=Path, default=COEFFICIENTS, help="the file to write (default: the package's)")
    args = parser.parse_args(argv)
    found = fit(args.results)
    args.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for one in found["residuals"]:
        mark = "held out" if one["held_out"] else "fitted"
        print(f"{mark:8}  {100 * one['error']:+6.1f} %  {one['measured_us']:12,.1f} us  {one['what']}")
    for one in found["serving"]:
        mark = "held out" if one["held_out"] else "fitted"
        print(f"{mark:8}  {100 * one['error']:+6.1f} %  {one['measured']:12.6g} {one['figure']:6}  {one['what']}")
    for one in found["parallel"]["residuals"]:
        mark = "held out" if one["held_out"] else "used"
        print(f"{mark:8}  {100 * one['error']:+6.1f} %  {one['measured_us']:12,.1f} us  {one['what']} GPUs")
    print(f"worst of requests held out: {found['error']['serving_held_out_worst']:.1%}")
    print(f"worst: fitted {found['error']['fitted_worst']:.1%}, held out {found['error']['held_out_worst']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
