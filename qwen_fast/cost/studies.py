"""Which published figures of the two studies cannot hold: the arithmetic from the studies' own figures, each step written
out; and the page that shows it with our reports beside the studies (beside.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from .beside import comparison
from .machine import device_name
from .render_html import table_html, wrap
from .render_markdown import markdown
from .studies_data import (
    BATCH_A,
    EMBEDDING_0_5B,
    ENERGY_A,
    GB_PER_1K_A,
    KV_BYTES_0_5B,
    MB_PER_1K_A,
    PARAMETERS_0_5B,
    PEAK_GB_A,
    PER_WATT_B,
    SPEED_A,
    YUAN_PER_KWH_A,
)
from .study_b import CLAIMS
from .tables import cell, column, row, table


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
        _peak(),
        _tail(),
        *_money_a(),
        *_prices_b(),
        *_parallel_b(),
        _bound_b(),
        _watts_b(),
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
        False, f"Not of the whole machine. One card's share of four with all 64 sequences in every step would be {least / 256:.1f} GB and "
        "its cache: then the unit (a card) and the load are missing beside the figure.",
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
    per_token = KV_BYTES_0_5B
    return Verdict(
        "A", f"each 1,000 output tokens add {MB_PER_1K_A} MB a card, on four cards",
        f"2 (K, V) x 24 layers x 2 heads x 64 x 2 bytes = {per_token:,} bytes a token; 1,000 tokens are {per_token / 1000:.2f} MB in "
        f"all. With two KV heads four cards cannot split them four ways: {per_token / 2000:.2f} MB a card, or {per_token / 4000:.2f} MB if they could.",
        False, "Too small by a factor of 2.9 to 5.7 for a full 16-bit cache.",
    )  # fmt: skip


def _peak() -> Verdict:
    tokens = 32 * 131_072
    total = tokens * KV_BYTES_0_5B / 1e9
    return Verdict(
        "A", f"128K tokens with batch 32 peak at {PEAK_GB_A} GB a card",
        f"32 x 131,072 tokens x {KV_BYTES_0_5B:,} bytes = {total:.1f} GB of 16-bit cache. Over four cards, could its two KV heads be cut so, "
        f"{total / 4:.1f} GB a card, weights and the rest not counted; cut in two, {total / 2:.1f} GB.",
        False, "The 32 sequences cannot have been 128K long each: 128K is the limit that was set, not what was in the cache.",
    )  # fmt: skip


def _tail() -> Verdict:
    said = []
    for batch, rate, _, p99 in (BATCH_A[0], BATCH_A[-1]):
        each = rate / batch
        said.append(
            f"batch {batch}: {rate} / {batch} = {each:.1f} tokens/s for each, so 280 tokens take {280 / each:.1f} s, and {p99:,} ms are {p99 / 1000 * each:.0f} tokens"
        )
    return Verdict(
        "A", "P99 of 1,420 to 2,410 ms at batches of 8 to 48",
        "; ".join(said) + ".",
        False, "Not the time of a whole answer of any of its three workloads (280 to 1,100 tokens); the first token may be meant.",
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


def _watts_b() -> Verdict:
    rates = (CLAIMS[0].tokens_per_s, CLAIMS[2].tokens_per_s, CLAIMS[4].tokens_per_s)
    said = "; ".join(
        f"{name}: {rate:g} / {value} = {rate / value:,.0f} W" for (name, value), rate in zip(PER_WATT_B, rates)
    )
    return Verdict(
        "B", "0.046, 0.061 and 0.069 tokens/s per W", f"{said}.", True,
        "Possible for whole machines under load. It is the figure of one user at a time, except in the row of four cards: batching is what raises it.",
    )  # fmt: skip


# -- the page


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


def _lead() -> str:
    bad = sum(not one.holds for one in verdicts())
    return (
        f"{bad} of {len(verdicts())} published figures that can be checked by arithmetic cannot hold as printed. Where they do not, the unit, "
        "the window or the method was missing beside the figure: that is why each of ours has all three. The published figures are claims from "
        "other hardware and other engines; beside ours they say how far apart, not why."
    )


def _heading(document: Mapping[str, Any]) -> str:
    count = int(document["engine"].get("tensor_parallel_size") or 1)
    where = device_name(document) if count > 1 or not document["machine"]["gpus"] else f"one {device_name(document)}"
    return f"{document['model']['name']}, weights {document['engine']['quantization']}, on {where}"


def studies_html(reports: list[Mapping[str, Any]]) -> str:
    """A page: the verdicts, then each report's figures beside the published ones."""
    lead = _lead()
    parts = [
        f'<header><div class="in"><div class="kicker">qwen_fast</div><h1>Beside the two studies</h1><p>{escape(lead)}</p></div></header><main>'
    ]
    parts.append(f"<section>{table_html(verdict_table())}</section>")
    for document in reports:
        tables = "".join(table_html(one) for one in comparison(document))
        parts.append(f"<section><h2>{escape(_heading(document))}</h2>{tables}</section>")
    return wrap("Beside the two studies", "".join([*parts, "</main>"])).replace('href="#def-', 'data-definition="')


def studies_markdown(reports: list[Mapping[str, Any]]) -> str:
    """The same as Markdown, for a repository."""
    lines = [
        "# Beside the two studies",
        "",
        _lead(),
        "",
    ]
    lines += ["| published | can hold | arithmetic | reading |", "|---|---|---|---|"]
    lines += [
        f"| {one.study}: {one.claim} | {'yes' if one.holds else 'no'} | {one.arithmetic} | {one.reading} |"
        for one in verdicts()
    ]
    for document in reports:
        lines += ["", f"## {_heading(document)}"]
        for one in comparison(document):
            lines += markdown(one)
    return "\n".join(lines) + "\n"
