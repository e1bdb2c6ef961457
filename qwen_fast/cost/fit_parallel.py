"""The last stage of fit.py: one model over several GPUs, from the newest <date>-gpu-tp.json (benchmarks/gpu_tp.py).

Three figures are taken, nothing else is fitted: what a short sum over the GPUs takes where it is a kernel (7B in 16 bits, a step of
one sequence), the same inside the kernel of a whole step (7B in 4 bits: what its step takes beyond one GPU's terms), and the
share of the link's rate that the sums of a long prompt reach (72B). Kernels' times are means over the ranks, waiting for one
another included; where a file has no steps taken apart, the all-reduce program's own times stand in. All other rows of several GPUs
are held out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import roofline
from .cards import Card
from .memory import Formats
from .shapes import find_shape

SHORT, INSIDE, LONG = "7b-bf16-1", "7b-w4-1", "72b-w4-prefill"  # the rows that the figures come from
CHUNK = 8192  # of gpu_tp.py's engines
_NAME = re.compile(r"([\d.]+b)-(w4|bf16)-(\d+|prefill)")
Newest = Callable[[Path, str], tuple[Path, dict[str, Any]]]


def parallel_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of more than one GPU."""
    found = []
    for row in data["rows"]:
        match = _NAME.fullmatch(row["row"])
        if match is None or row["gpus"] < 2:
            continue
        model, weights, batch = match.groups()
        found.append({
            "what": f"{row['row']} on {row['gpus']}", "row": row["row"], "ranks": row["gpus"], "shape": find_shape(model.upper()),
            "formats": Formats(4 if weights == "w4" else 16, 16), "batch": 0 if batch == "prefill" else int(batch),
            "context": row["prompt_tokens"] + row.get("new_tokens", 256) / 2, "tokens": row["prompt_tokens"],
            "seconds": row["seconds"]["median"], "split": row.get("split"),
        })  # fmt: skip
    return found


def _message_us(row: dict[str, Any]) -> float | None:
    """Of one sum, by all messages of a step, the mean over the ranks; None where the sums are no kernels of their own."""
    ranks = list(row["split"]["ranks"].values())
    if min(one["message_calls"] for one in ranks) < roofline.exchanges(row["shape"]):
        return None
    return float(sum(one["messages_us"] for one in ranks) / len(ranks) / roofline.exchanges(row["shape"]))


def exchange(
    rows: list[dict[str, Any]], messages: dict[str, Any], fitted: dict[str, Any], card: Card
) -> tuple[dict[str, float], set[str]]:
    """us, one_us and share, and the rows that they come from."""
    two = {row["row"]: row for row in rows if row["ranks"] == 2}
    programs, used = messages.get("2", []), set()

    def sum_us(name: str, hidden: int, tokens: int) -> float:
        found = _message_us(two[name]) if name in two and two[name]["split"] else None
        if found is not None:
            used.add(name)
            return found
        return next(float(one["ours_us"]) for one in programs if (one["hidden_size"], one["rows"]) == (hidden, tokens))

    shortest, long_us = sum_us(SHORT, 3584, 1), sum_us(LONG, 8192, 2048)
    sent = roofline.sent_bytes(find_shape("72B"), 2048, 2)
    link = {"us": shortest, "one_us": shortest, "share": sent / (long_us - shortest) / 1e3 / card.link_gbs}
    if INSIDE in two and two[INSIDE]["split"] and _message_us(two[INSIDE]) is None:
        row = two[INSIDE]
        sums = roofline.exchanges(row["shape"])
        beyond = 1e6 * (row["seconds"] - predicted_seconds(row, {**fitted, "parallel": {"exchange": link}}, card))
        link["one_us"] = max(0.0, shortest + beyond / sums)
        used.add(INSIDE)
    return {name: round(value, 6) for name, value in link.items()}, used


def predicted_seconds(row: dict[str, Any], fitted: dict[str, Any], card: Card) -> float:
    shape, formats, ranks = row["shape"], row["formats"], row["ranks"]
    if row["batch"] == 0:
        return roofline.prefill_seconds(shape, formats, row["tokens"], CHUNK, card, fitted, ranks)
    return roofline.decode_seconds(shape, formats, row["batch"], row["context"], card, fitted, ranks)


def fit_parallel(results: Path, fitted: dict[str, Any], card: Card, newest: Newest) -> dict[str, Any]:
    """ "exchange", the numbers of GPUs and the models that were measured, every row beside its prediction, and the largest factor by which one
    is off."""
    path, data = newest(results, "gpu-tp")
    rows = parallel_rows(data)
    link, used = exchange(rows, data["environment"]["messages"], fitted, card)
    known = {**fitted, "parallel": {"exchange": link}}
    residuals = []
    for row in rows:
        predicted = predicted_seconds(row, known, card)
        residuals.append({"what": row["what"], "held_out": not (row["row"] in used and row["ranks"] == 2),
                          "measured_us": round(1e6 * row["seconds"], 3), "predicted_us": round(1e6 * predicted, 3),
                          "error": round(predicted / row["seconds"] - 1, 6)})  # fmt: skip
    ratios = [1 + one["error"] for one in residuals]
    return {
        "exchange": link,
        "file": path.name,
        "ranks": sorted({row["ranks"] for row in rows}),
        "models": sorted({f"{row['shape'].name}, {row['formats'].weight_bits} bits" for row in rows}),
        "residuals": residuals,
        "factor": round(max(max(ratio, 1 / ratio) for ratio in ratios), 6),
    }
