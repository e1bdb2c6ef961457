"""The third stage of fit.py: what whole requests take, from the committed cost reports (<date>-cost-<model>/report.json).

Three factors, with those of the other stages as they are: what a layer of a short prompt takes more than in a captured
graph (times to the first token of one user), and, for several sequences beyond LONG_CONTEXT positions, a layer's part and
the cache's bytes (times between tokens). Held out, by rule: every second stage, in the order of the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import roofline
from .cards import Card
from .memory import Formats
from .shapes import find_shape
from .speed import Steady, Workload, steady

FACTORS = ("layers_prompt", "layers_long", "kv_long")
LeastSquares = Callable[[list[list[float]], list[float], list[float]], list[float]]


COMPARISON = "-gpus"  # a folder's end: one GPU against several, which no fit takes in


def reports(results: Path) -> list[Path]:
    """The newest report of each model."""
    newest: dict[str, Path] = {}
    for path in sorted(results.glob("????-??-??-cost-*/report.json")):
        if not path.parent.name.endswith(COMPARISON):
            newest[path.parent.name[11:]] = path
    return list(newest.values())


def serving_rows(results: Path) -> list[dict[str, Any]]:
    """Loads and the sweep over the prompt's length: the middle TTFT, the mean TPOT, and tokens/s. Of the sweep (8 tokens
    out) the TTFT alone counts."""
    rows = []
    for path in reports(results):
        document = json.loads(path.read_text(encoding="utf-8"))
        engine, stages = document["engine"], document["measurements"]["stages"]
        formats = Formats(4 if engine["quantization"] == "w4" else 16, 16)
        keys = [key for key in stages if key.startswith(("load:", "sweep:"))]
        for position, key in enumerate(keys):
            load = stages[key]
            seconds = sum(window["seconds"] for window in load["windows"])
            tokens = round(load["prompt_tokens"]), round(load["output_tokens"])
            found = {
                "what": f"{path.parent.name[16:]}: {key}", "file": path.relative_to(results).as_posix(), "formats": formats,
                "shape": find_shape(_name(document)), "chunk": engine["max_num_batched_tokens"],
                "workload": Workload(*tokens, load["users"], sum(tokens)), "held": position % 2 == 1,
                "ttft_s": load["requests"]["ttft_ms"]["p50"] / 1e3,
            }  # fmt: skip
            if key.startswith("load:"):
                found["tpot_s"] = load["requests"]["tpot_ms"]["mean"] / 1e3
                found["rate"] = sum(window["output_tokens"] for window in load["windows"]) / seconds
            rows.append(found)
    return rows


def _name(document: dict[str, Any]) -> str:
    return str(document["model"]["name"]).removeprefix("Qwen2.5-").split()[0].split("-")[0]


def predicted(row: dict[str, Any], fitted: dict[str, Any], card: Card) -> Steady:
    return steady(row["shape"], row["formats"], card, row["workload"], row["chunk"], fitted)


def fit_serving(
    rows: list[dict[str, Any]], fitted: dict[str, Any], card: Card, read_limit: float, solve: LeastSquares
) -> dict[str, float]:
    """The three factors. fitted: the other stages' coefficients."""
    seen = [row for row in rows if not row["held"]]
    with_factors = {**fitted, "factors": {**fitted["factors"], **dict.fromkeys(FACTORS, 0.0)}}
    factors: dict[str, float] = with_factors["factors"]
    short = [r for r in seen if r["workload"].users == 1 and r["workload"].tokens_in <= roofline.GRAPH_TOKENS]
    if short:
        left = [1 - predicted(r, with_factors, card).prompt_s / r["ttft_s"] for r in short]
        columns = [[r["shape"].num_layers / 1e6 / r["ttft_s"]] for r in short]
        factors["layers_prompt"] = solve(columns, left, [0.0])[0]
    longer = [r for r in seen if "tpot_s" in r and r["workload"].users > 1 and _context(r) > roofline.LONG_CONTEXT]
    if longer:
        left = [1 - predicted(r, with_factors, card).tpot_s / r["tpot_s"] for r in longer]
        columns = []
        for r in longer:
            users = r["workload"].users
            step = roofline.Step(users, users, _context(r), True, users)
            terms = roofline.features(r["shape"], r["formats"], step, card, fitted)
            columns.append([terms[name] / 1e6 / r["tpot_s"] for name in ("layers_long", "kv_long")])
        factors["layers_long"], factors["kv_long"] = solve(columns, left, [0.0, 1 / read_limit])
    else:
        factors["kv_long"] = factors["kv_graph"]
    return {name: round(factors[name], 6) for name in FACTORS}


def _context(row: dict[str, Any]) -> float:
    return row["workload"].tokens_in + row["workload"].tokens_out / 2


def describe_serving(rows: list[dict[str, Any]], fitted: dict[str, Any], card: Card) -> list[dict[str, Any]]:
    """Every row's figures beside what is predicted."""
    found = []
    for row in rows:
        made = predicted(row, fitted, card)
        for name, value in (("ttft_s", made.ttft_busy_s), ("tpot_s", made.tpot_s), ("rate", made.rate)):
            if name in row:
                found.append({"what": row["what"], "file": row["file"], "figure": name, "held_out": row["held"],
                              "measured": round(row[name], 7), "predicted": round(value, 7),
                              "error": round(value / row[name] - 1, 6)})  # fmt: skip
    return found
