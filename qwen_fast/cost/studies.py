"""The published figures of the two studies, as data: claims from other hardware, not ours. And the arithmetic that says
which of them cannot hold, each step written out from the study's own figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from .render_html import table_html, wrap
from .study_b import CLAIMS
from .tables import Cell, cell, column, number, row, table

PARAMETERS_0_5B = 494_032_768  # 136,134,656 of them the embedding, which is the head too
EMBEDDING_0_5B = 136_134_656
SET_UP_A = "Qwen2.5-0.5B-Instruct, AWQ 4 bits, FP16 KV cache, 4x RTX 4090D (24 GB, 1.0 TB/s, 350 W), max_num_seqs 64"


@dataclass(frozen=True)
class SpeedA:
    """A workload of study A: tokens, its figures of time, and shares of the GPU in percent."""

    workload: str
    tokens_in: int
    tokens_out: int
    ms_per_token: float
    tokens_s: float
    ms_per_1k: float
    gpu: int
    bandwidth: int
    tensor: int


SPEED_A = (
    SpeedA("short", 120, 280, 12.4, 80.6, 12_400, 42, 32, 39),
    SpeedA("summary", 1850, 620, 18.9, 52.9, 18_900, 69, 72, 65),
    SpeedA("json", 310, 1100, 15.3, 65.4, 15_300, 59, 64, 58),
)


@dataclass(frozen=True)
class EnergyA:
    """A level of load of study A. joules_1k, yuan_1k: for 1,000 tokens, at 0.6 yuan a kWh."""

    level: str
    batch: int
    gpu: int
    watts: float
    joules_1k: float
    yuan_1k: float


ENERGY_A = (
    EnergyA("low", 1, 35, 497, 2.18, 0.00036),
    EnergyA("medium", 16, 62, 880, 3.87, 0.00065),
    EnergyA("high", 32, 78, 1108, 4.87, 0.00081),
)
BATCH_A = ((8, 312, 0.3, 1420), (16, 589, 0.8, 1580), (32, 721, 2.1, 1940), (48, 735, 3.7, 2410))  # tok/s, +-GB, P99 ms
MEMORY_A = {"weights": 1.32, "KV cache, batch 16": 3.85, "KV cache, 128K": 8.2, "intermediate": 0.91}  # GB a card
GB_PER_1K_A = 2.1
MB_PER_1K_A = 1.07  # a card of four
YUAN_PER_KWH_A = 0.6


@dataclass(frozen=True)
class Verdict:
    """A published figure held against arithmetic. holds: False where it cannot be as printed."""

    study: str
    claim: str
    arithmetic: str
    holds: bool
    reading: str


def verdicts() -> list[Verdict]:
    """Every published figure that can be checked by the study's own figures alone."""
    return [
        _weights(),
        _traffic(),
        *_energy(),
        _constant(),
        _units(),
        _cache(),
        *_money_a(),
        *_prices_b(),
        *_parallel_b(),
        _bound_b(),
    ]


def _weights() -> Verdict:
    linear = PARAMETERS_0_5B - EMBEDDING_0_5B
    four, head = linear * 4.25 / 8 / 1e9, EMBEDDING_0_5B * 2 / 1e9
    return Verdict(
        "A", "weights of the 4-bit model: 1.32 GB a card",
        f"{linear / 1e6:.0f} M parameters of the layers at 4.25 bits (scales included) are {four:.2f} GB; the embedding, which is "
        f"the head too, {EMBEDDING_0_5B / 1e6:.0f} M at 16 bits, is {head:.2f} GB; together {four + head:.2f} GB. With head and "
        f"embedding kept apart {four + 2 * head:.2f} GB.",
        False, f"1.32 GB holds {1.32 - four - 2 * head:.2f} GB besides weights: the process's context, or 16-bit copies, are counted in.",
    )  # fmt: skip


def _traffic() -> Verdict:
    read = ((PARAMETERS_0_5B - EMBEDDING_0_5B) * 4.25 / 8 + EMBEDDING_0_5B * 2) / 1e9
    least = 1000 * read
    return Verdict(
        "A", f"{GB_PER_1K_A} GB moved for 1,000 tokens",
        f"one token by itself reads layers and head once: {read:.2f} GB, 1,000 of them {least:,.0f} GB. {GB_PER_1K_A} GB need "
        f"{least / GB_PER_1K_A:,.0f} tokens in every step, and max_num_seqs is 64: {least / 64:.1f} GB at the least, without the KV cache.",
        False, "A unit or a division is missing: 2.1 GB is between four and five reads of the weights.",
    )  # fmt: skip


def _energy() -> list[Verdict]:
    found = []
    rates = {1: SPEED_A[0].tokens_s, 16: 589.0, 32: 721.0}
    for one in ENERGY_A:
        rate = rates[one.batch]
        joules = 1000 * one.watts / rate
        found.append(
            Verdict(
                "A", f"{one.joules_1k} J per 1,000 tokens at {one.level} load (batch {one.batch}, {one.watts:g} W)",
                f"{one.watts:g} W / {rate:g} tokens/s (the study's own, batch {one.batch}) x 1,000 = {joules:,.0f} J. For {one.joules_1k} J at "
                f"{one.watts:g} W the speed must be {1000 * one.watts / one.joules_1k:,.0f} tokens/s.",
                False, _wrong(joules, one.joules_1k),
            )
        )  # fmt: skip
    return found


def _wrong(joules: float, printed: float) -> str:
    times = joules / printed / 1000
    said = f"{times:.1f} times too little" if times > 1 else f"{1 / times:.1f} times too much"
    return f"Wrong by a factor of {joules / printed:,.0f}; read as kJ, {said}."


def _constant() -> Verdict:
    seconds = [1000 * one.joules_1k / one.watts for one in ENERGY_A]
    said = ", ".join(f"{one.joules_1k} kJ / {one.watts:g} W = {value:.2f} s" for one, value in zip(ENERGY_A, seconds))
    return Verdict(
        "A", "the three energy figures, read as kJ, against the batch table",
        f"{said}: all three levels take the same time for 1,000 tokens, {1000 / seconds[0]:.0f} tokens/s. The same study has "
        f"{SPEED_A[0].tokens_s} tokens/s with one request, 589 at batch 16 and 721 at batch 32.",
        False, "All three are watts times one and the same time: as if computed from one speed, not measured level by level.",
    )  # fmt: skip


def _units() -> Verdict:
    said = "; ".join(f"{1000 / one.ms_per_token:.1f} against {one.tokens_s} tokens/s" for one in SPEED_A)
    return Verdict(
        "A", '"12.4 to 18.9 ms per 1k tokens", where the text sums up',
        f"1,000 / 12.4, 18.9 and 15.3 ms: {said}. The table's 12,400 to 18,900 ms for 1,000 tokens agree with that.",
        False, "12.4 to 18.9 ms are for one token; for 1,000 tokens they are seconds.",
    )  # fmt: skip


def _cache() -> Verdict:
    per_token = 2 * 24 * 2 * 64 * 2
    return Verdict(
        "A", f"each 1,000 output tokens add {MB_PER_1K_A} MB a card, on four cards",
        f"2 (K, V) x 24 layers x 2 heads x 64 x 2 bytes = {per_token:,} bytes a token; 1,000 tokens are {per_token / 1000:.2f} MB in "
        f"all. With two KV heads four cards cannot split them four ways: {per_token / 2000:.2f} MB a card, or {per_token / 4000:.2f} MB if they could.",
        False, "Too small by a factor of 2.9 to 5.7 for a full 16-bit cache.",
    )  # fmt: skip


def _money_a() -> list[Verdict]:
    found = []
    for one in ENERGY_A:
        yuan = one.joules_1k / 3.6e6 * YUAN_PER_KWH_A
        found.append(
            Verdict(
                "A", f"¥{one.yuan_1k:.5f} per 1,000 tokens at {one.level} load",
                f"{one.joules_1k} J / 3,600,000 J/kWh x ¥{YUAN_PER_KWH_A}/kWh = ¥{yuan:.2g}; of {one.joules_1k} kJ it is ¥{yuan * 1000:.5f}.",
                False, "It follows from kJ, not from the J beside it; the money carries the error of the energy.",
            )
        )  # fmt: skip
    return found


def _prices_b() -> list[Verdict]:
    found = []
    for one in CLAIMS:
        if one.price_per_hour is None or one.price_per_million is None:
            continue
        own = one.price_per_hour / (one.tokens_per_s * 3600) * 1e6
        holds = abs(own / one.price_per_million - 1) < 0.1
        times = own / one.price_per_million
        found.append(
            Verdict(
                "B", f"{one.name}: ¥{one.price_per_million} per million tokens",
                f"¥{one.price_per_hour}/h / ({one.tokens_per_s} tokens/s x 3,600 s) x 1,000,000 = ¥{own:.1f}.",
                holds, "Agrees." if holds else f"{times:.1f} times as much as printed: several users at once may be meant, and are not stated.",
            )
        )  # fmt: skip
    return found


def _parallel_b() -> list[Verdict]:
    found = []
    for one in CLAIMS:
        alone = 1000 / one.tpot_ms
        if one.tokens_per_s > 1.2 * alone:
            found.append(
                Verdict(
                    "B", f"{one.name}: TPOT {one.tpot_ms:g} ms and {one.tokens_per_s:g} tokens/s",
                    f"1,000 / {one.tpot_ms:g} ms = {alone:.1f} tokens/s for one user; {one.tokens_per_s:g} tokens/s are {one.tokens_per_s / alone:.1f} users.",
                    True, "Possible only as a sum over users; the other rows are of one user, so the column mixes two things.",
                )
            )  # fmt: skip
    return found


def _bound_b() -> Verdict:
    first = CLAIMS[0]
    seconds = (first.ttft_ms + 511 * first.tpot_ms) / 1000
    return Verdict(
        "B", "concurrency with P99 below 3 s, for answers of 512 tokens",
        f"{first.ttft_ms:g} ms + 511 x {first.tpot_ms:g} ms = {seconds:.1f} s for one answer of one user on the first card.",
        False, "No card meets 3 s for a whole answer; the bound can only be for the first token, which the study does not say.",
    )  # fmt: skip


# -- beside a report of ours


def comparison(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables that set the studies' figures beside a report's own. Other hardware: the ratio says how far apart, not which
    engine is better."""
    stages = document["measurements"]["stages"]
    return [_speed_table(stages), _chat_table(stages), _batch_table(stages)]


def _ours(stages: Mapping[str, Any], key: str, pick: Callable[[Mapping[str, Any]], float | None]) -> Cell:
    load = stages.get(key)
    return cell(pick(load) if load else None, "not measured: this report has no such load")


def _rate(load: Mapping[str, Any]) -> float | None:
    seconds = sum(window["seconds"] for window in load["windows"])
    return sum(window["output_tokens"] for window in load["windows"]) / seconds if seconds else None


def _mean(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda load: load["requests"][name]["mean"] if load["requests"][name] else None


def _speed_table(stages: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("theirs", "study A", "tokens/s", "published", "tokens_s"),
        column("ours", "here", "tokens/s", "measured: 1 user", "tokens_s"),
        column("theirs_ms", "study A", "ms per token", "published", "ms_token"),
        column("ours_ms", "here: TPOT", "ms", "measured: 1 user, mean", "tpot"),
    ]
    rows = []
    for one in SPEED_A:
        key = f"load:{one.workload}:1"
        cells = {
            "theirs": cell(one.tokens_s), "ours": _ours(stages, key, _rate), "theirs_ms": cell(one.ms_per_token),
            "ours_ms": _ours(stages, key, _mean("tpot_ms")),
        }  # fmt: skip
        rows.append(row(f"{one.workload} ({one.tokens_in:,} in / {one.tokens_out:,} out)", _window(stages, key), cells))
    return table("study-a-speed", "Study A: speed", "workload", columns, rows, SET_UP_A)


def _window(stages: Mapping[str, Any], key: str) -> str:
    return f"here: {stages[key]['label']}; {stages[key]['window']}" if key in stages else "none"


def _chat_table(stages: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("ttft", "TTFT", "ms", "published; here measured, mean", "ttft"),
        column("tpot", "TPOT", "ms", "published; here measured, mean", "tpot"),
        column("rate", "output", "tokens/s", "published; here measured", "tokens_s"),
    ]
    rows = [
        row(
            f"{one.name} (published)",
            "not stated",
            {"ttft": cell(one.ttft_ms), "tpot": cell(one.tpot_ms), "rate": cell(one.tokens_per_s)},
        )
        for one in CLAIMS
    ]
    for users in (1, 2, 4, 8, 16):
        key = f"load:chat:{users}"
        cells = {
            "ttft": _ours(stages, key, _mean("ttft_ms")), "tpot": _ours(stages, key, _mean("tpot_ms")), "rate": _ours(stages, key, _rate),
        }  # fmt: skip
        rows.append(row(f"here, {users} user{'s' if users > 1 else ''}", _window(stages, key), cells))
    return table(
        "study-b",
        "Study B: chat with history",
        "machine",
        columns,
        rows,
        "Published rows: Qwen2.5-7B-Instruct, 2,048 in / 512 out.",
    )


def _batch_table(stages: Mapping[str, Any]) -> dict[str, Any]:
    columns = [
        column("theirs", "study A", "tokens/s", "published", "tokens_s"),
        column("ours", "here", "tokens/s", "measured", "tokens_s"),
        column("theirs_p99", "study A: P99", "ms", "published; of what is not stated", "p99"),
        column("ours_p99", "here: end to end P99", "ms", "measured: nearest rank", "p99"),
    ]

    def tail(load: Mapping[str, Any]) -> float | None:
        found = load["requests"]["e2e_s"]
        return 1000 * found["p99"] if found else None

    rows = []
    for batch, rate, _, p99 in BATCH_A:
        key = f"lever:batch:{batch}"
        cells = {
            "theirs": cell(rate),
            "ours": _ours(stages, key, _rate),
            "theirs_p99": cell(p99),
            "ours_p99": _ours(stages, key, tail),
        }
        rows.append(row(f"batch {batch}", _window(stages, key), cells))
    return table("study-a-batch", "Study A: batch size", "batch", columns, rows)


def verdict_table() -> dict[str, Any]:
    columns = [
        column("how", "arithmetic", "", "from the study's own figures and the model's shape", "money"),
        column("holds", "can hold", "yes or no", "follows from the arithmetic", "money"),
        column("reading", "reading", "", "ours", "money"),
    ]
    rows = [
        row(f"{one.study}: {one.claim}", f"study {one.study}", {
            "how": cell(one.arithmetic), "holds": cell("yes" if one.holds else "no"), "reading": cell(one.reading)})
        for one in verdicts()
    ]  # fmt: skip
    return table("verdicts", "Published figures held against arithmetic", "published", columns, rows)


def studies_html(reports: list[Mapping[str, Any]]) -> str:
    """A page: the verdicts, then each report's figures beside the published ones."""
    bad = sum(not one.holds for one in verdicts())
    lead = (
        f"{bad} of {len(verdicts())} published figures that can be checked by arithmetic cannot hold as printed. Where they do not, the unit, "
        "the window or the method was missing beside the figure: that is why each of ours has all three."
    )
    parts = [
        f'<header><div class="in"><div class="kicker">qwen_fast</div><h1>Beside the two studies</h1><p>{escape(lead)}</p></div></header><main>'
    ]
    parts.append(f"<section>{table_html(verdict_table())}</section>")
    for document in reports:
        machine = document["machine"]["gpus"][0]["name"] if document["machine"]["gpus"] else document["machine"]["cpu"]
        tables = "".join(table_html(one) for one in comparison(document))
        parts.append(f"<section><h2>{escape(document['model']['name'])} on {escape(machine)}</h2>{tables}</section>")
    return wrap("Beside the two studies", "".join([*parts, "</main>"])).replace('href="#def-', 'data-definition="')


def studies_markdown(reports: list[Mapping[str, Any]]) -> str:
    """The same as Markdown, for a repository."""
    lines = [
        "# Beside the two studies",
        "",
        "Published figures are claims from other hardware. `no`: cannot hold as printed.",
        "",
    ]
    lines += ["| published | can hold | arithmetic | reading |", "|---|---|---|---|"]
    lines += [
        f"| {one.study}: {one.claim} | {'yes' if one.holds else 'no'} | {one.arithmetic} | {one.reading} |"
        for one in verdicts()
    ]
    for document in reports:
        machine = document["machine"]["gpus"][0]["name"] if document["machine"]["gpus"] else document["machine"]["cpu"]
        lines += ["", f"## {document['model']['name']} on {machine}"]
        for one in comparison(document):
            heads = [
                one["first"],
                *(f"{entry['title']}, {entry['unit']} ({entry['method']})" for entry in one["columns"]),
                "window",
            ]
            lines += ["", f"### {one['title']}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            for entry in one["rows"]:
                texts = [_text(entry["cells"][key["key"]]) for key in one["columns"]]
                lines.append(f"| {' | '.join([entry['label'], *texts, entry['window']])} |")
    return "\n".join(lines) + "\n"


def _text(entry: Cell) -> str:
    return entry["why"] if entry["value"] is None else number(entry["value"])
