"""A report of ours beside the two studies: the same question, the published figure and what was measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .section_parallel import NAME, SUMMARY
from .studies_data import (
    BATCH_A,
    ENERGY_A,
    GB_PER_1K_A,
    MB_PER_1K_A,
    MEMORY_A,
    PARAMETERS_0_5B,
    PARAMETERS_7B,
    PER_WATT_B,
    SET_UP_A,
    SPEED_A,
)
from .study_b import CLAIMS
from .tables import Cell, cell, column, number, row, table


def comparison(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables that set the studies' figures beside a report's own: study A's for any model but 7B, which is study B's, and B's
    for any but 0.5B. Other hardware: the ratio says how far apart, not which engine is better."""
    stages, parameters, found = document["measurements"]["stages"], document["model"]["parameters"], _Found(document)
    tables: list[dict[str, Any]] = []
    if parameters != PARAMETERS_7B:
        tables += [_speed_table(stages), _use_table(found), _energy_table(found), _batch_table(stages), _more_a(found)]
    if parameters != PARAMETERS_0_5B:
        tables += [_chat_table(stages), _more_b(found)]
        if NAME in found.tables:
            tables.append(_gpus_table(found))
    return tables


class _Found:
    """Cells of a report by table, row and column; where one is not there, a cell that says so."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.tables = {one["id"]: one for part in document["sections"] for one in part["tables"]}
        self.currency = document["prices"]["currency"]
        self.p99_s = document["settings"]["p99_s"]
        self.gpu = (document["machine"]["gpus"] or [{"name": document["machine"]["cpu"]}])[0]["name"]

    def cell(self, name: str, label: str, key: str, factor: float = 1.0) -> Cell:
        entry = self.row(name, label)
        if entry is None or key not in entry["cells"]:
            return cell(None, "not measured: this report has no such load")
        value = entry["cells"][key]["value"]
        if value is None:
            return cell(None, entry["cells"][key]["why"])
        return cell(value if isinstance(value, str) else value * factor)

    def row(self, name: str, label: str) -> Mapping[str, Any] | None:
        rows = self.tables[name]["rows"] if name in self.tables else ()
        return next((one for one in rows if one["label"].startswith(label)), None)

    def window(self, name: str, label: str) -> str:
        entry = self.row(name, label)
        return f"here: {entry['window']}" if entry is not None else "none"

    def text(self, form: str, *places: tuple[str, str, str]) -> Cell:
        """Several figures in one sentence; the first that is missing says why."""
        cells = [self.cell(*place) for place in places]
        missing = next((one for one in cells if one["value"] is None), None)
        return missing or cell(form.format(*(number(one["value"]) for one in cells)))


def _load(workload: str, users: int) -> str:
    title = {
        "short": "short QA",
        "summary": "document summary",
        "json": "structured JSON",
        "chat": "chat with history",
    }[workload]
    return f"{title}, {users} user{'s' if users > 1 else ''} "


def _use_table(found: _Found) -> dict[str, Any]:
    keys = (("gpu", "busy", "GPU", "busy"), ("bandwidth", "bandwidth", "memory bandwidth", "bandwidth"),
            ("tensor", "compute", "tensor cores", "compute"))  # fmt: skip
    columns = []
    for name, ours, title, definition in keys:
        columns.append(column(f"theirs_{name}", f"study A: {title}", "%", "published", definition))
        columns.append(column(ours, f"here: {title}", "%", "measured: 1 user", definition))
    rows = []
    for one in SPEED_A:
        label = _load(one.workload, 1)
        cells = {f"theirs_{name}": cell(getattr(one, name)) for name, *_ in keys}
        cells |= {ours: found.cell("use-shares", label, ours) for _, ours, *_ in keys}
        rows.append(row(one.workload, found.window("use-shares", label), cells))
    note = "Here: time with a step in flight; counted bytes and operations over what this GPU was measured to reach. The study does not say what its shares are of."
    return table("study-a-use", "Study A: utilisation", "workload", columns, rows, note)


def _energy_table(found: _Found) -> dict[str, Any]:
    columns = [
        column("theirs_watts", "study A: whole machine", "W", "published", "watts"),
        column("watts", "here: GPU board", "W", "measured: energy counter", "watts"),
        column("theirs", "study A", "J per 1,000 tokens", "published", "joules"),
        column("follows", "what its watts and tokens/s give", "J per 1,000 tokens", "computed", "joules"),
        column("ours", "here", "J per 1,000 output tokens", "measured: gross", "joules"),
        column("theirs_money", "study A", "¥ per 1,000 tokens", "published", "money"),
        column(
            "money",
            "here: electricity",
            f"{found.currency} per 1,000 output tokens",
            "computed: the report's tariff",
            "money",
        ),
    ]
    rates = {1: SPEED_A[0].tokens_s} | {batch: float(rate) for batch, rate, *_ in BATCH_A}
    rows = []
    for one in ENERGY_A:
        label = _load("short", one.batch)
        cells = {
            "theirs_watts": cell(one.watts), "watts": found.cell("power-energy", label, "watts"), "theirs": cell(one.joules_1k),
            "follows": cell(1000 * one.watts / rates[one.batch]), "ours": found.cell("power-energy", label, "gross"),
            "theirs_money": cell(one.yuan_1k), "money": found.cell("power-money-1k", label, "electricity"),
        }  # fmt: skip
        rows.append(row(f"{one.level} (batch {one.batch})", found.window("power-energy", label), cells))
    return table(
        "study-a-energy",
        "Study A: power and money",
        "load",
        columns,
        rows,
        "Here: short QA; host, fans and power supply are not in it.",
    )


def _claims(name: str, title: str, gpu: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = [
        column("theirs", "the study", "", "published", "share"),
        column("ours", "here", "", f"measured or counted on {gpu}", "share"),
    ]
    return table(name, title, "what", columns, rows)


def _more_a(found: _Found) -> dict[str, Any]:
    mb, memory = 2**20 / 1e6, found.tables.get("memory-breakdown", {"rows": ()})["rows"]
    parts = [
        one["cells"]["mib"]["value"]
        for one in memory
        if one["label"] in ("embedding", "layers' weights", "output head")
    ]
    weights = cell(f"{sum(parts) * mb / 1000:.2f} GB") if parts else cell(None, "not measured")
    workspace, per_1k = (
        found.cell("memory-breakdown", "workspace", "mib", mb / 1000),
        found.cell("memory-safe", "each 1,000", "mib", mb),
    )
    safe = found.cell("memory-safe", "smallest safe", "mib", mb / 1000)

    def said(entry: Cell, unit: str) -> Cell:
        return entry if entry["value"] is None else cell(f"{number(entry['value'])} {unit}")

    def line(label: str, theirs: str, ours: Cell, window: str = "plan") -> dict[str, Any]:
        return row(label, window, {"theirs": cell(theirs), "ours": ours})

    def lever(label: str, theirs: str, form: str, name: str, setting: str, *keys: str) -> dict[str, Any]:
        return line(
            label, theirs, found.text(form, *((name, setting, key) for key in keys)), found.window(name, setting)
        )

    base, host = (
        found.cell("lever-offload", f"embeddings on the {where}", "fixed", mb / 1000) for where in ("GPU", "host")
    )
    saved = "" if base["value"] is None or host["value"] is None else f"{host['value'] - base['value']:+.2f} GB, "
    rows = [
        line("weights", f"{MEMORY_A['weights']} GB a card", weights),
        line("intermediate state", f"{MEMORY_A['intermediate']} GB", said(workspace, "GB")),
        line("smallest safe card: 1 user, 512 tokens", "6.5 GB", said(safe, "GB, the driver's context in it")),
        line("1,000 tokens of KV cache", f"{MB_PER_1K_A} MB a card of four", said(per_1k, "MB, on one card")),
        lever("moved for 1,000 tokens", f"{GB_PER_1K_A} GB", "{} GB", "use-bytes", _load("short", 1), "all"),
        lever("the same with 32 users", "not stated", "{} GB", "use-bytes", _load("short", 32), "all"),
        lever("share of time that is decoding", "68 to 73 %", "{} % with 1 user of document summary", "time-split", _load("summary", 1), "decode"),
        lever("+100 output tokens", "+1.8 s", "+{} ms", "time-plus", "+100 output", "ms"),
        lever("+100 prompt tokens", "+0.3 s", "+{} ms", "time-plus", "+100 prompt", "ms"),
        lever("KV block of 16 tokens against 32", "32 better: 9 % more memory use", "tokens/s changed by {} %", "lever-block_size", "16", "more"),
        lever("embedding on the host", "-0.41 GB a card, -1.3 % tokens/s", saved + "tokens/s changed by {} % (8-bit head in both)", "lever-offload", "embeddings on the host", "more"),
        lever("output cap of 512 tokens", "recommended", "tokens/s changed by {} %, P99 {} ms", "lever-output", "512", "more", "p99"),
        lever("KV cache in FP8", "-39 % memory, +14 % tokens/s", "tokens/s changed by {} %", "lever-kv", "fp8", "more"),
        lever("KV cache in 4 bits", "-62 % memory, +28 % tokens/s", "tokens/s changed by {} %", "lever-kv", "int4", "more"),
    ]  # fmt: skip
    return _claims("study-a-more", "Study A: memory, traffic and levers", found.gpu, rows)


def _more_b(found: _Found) -> dict[str, Any]:
    def line(label: str, theirs: str, ours: Cell, window: str) -> dict[str, Any]:
        return row(label, window, {"theirs": cell(theirs), "ours": ours})

    rows = []
    for users in (1, 16):
        label = f"{users} user{'s' if users > 1 else ''}"
        theirs = "; ".join(f"{value} ({name})" for name, value in PER_WATT_B) if users == 1 else "not stated"
        ours = found.text("{} tokens/s per W of the board", ("concurrency-chat", label, "per_watt"))
        rows.append(line(f"tokens/s per W, {label}", theirs, ours, found.window("concurrency-chat", label)))
        rent = found.text(
            found.currency + "{} per million output tokens, hourly rent",
            ("power-money-1m", _load("chat", users), "rent"),
        )
        prices = (
            "; ".join(f"¥{one.price_per_million} ({one.name})" for one in CLAIMS if one.price_per_million)
            if users == 1
            else "not stated"
        )
        rows.append(
            line(
                f"price of a million tokens, {label}",
                prices,
                rent,
                found.window("power-money-1m", _load("chat", users)),
            )
        )
    supported = found.text(
        "{} (first token); {} (whole answer)",
        ("users-summary", "chat with history", "ttft"),
        ("users-summary", "chat with history", "e2e"),
    )
    claimed = "; ".join(f"{one.users} ({one.name})" for one in CLAIMS if one.users)
    if found.p99_s != 3:
        supported = cell(None, f"measured for P99 < {found.p99_s:g} s")
    rows.append(line("users with P99 < 3 s", claimed, supported, found.window("users-summary", "chat with history")))
    four, sixteen = (found.cell("lever-weights", setting, "fixed") for setting in ("w4", "none"))
    if four["value"] is not None and sixteen["value"] is not None:
        faster = found.cell("lever-weights", "none", "more")["value"]
        text = f"{100 * (four['value'] / sixteen['value'] - 1):.0f} % of weights and workspace, {100 / (1 + faster / 100) - 100:+.0f} % tokens/s (16 users)"
        ours = cell(text)
    else:
        ours = cell(None, "not measured")
    rows.append(
        line(
            "4-bit against 16-bit weights", "-50 % memory, slightly faster", ours, found.window("lever-weights", "none")
        )
    )
    return _claims("study-b-more", "Study B: energy, price, users and precision", found.gpu, rows)


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


def _gpus_table(found: _Found) -> dict[str, Any]:
    """One card against several: the study's two rows of that kind, and ours by number of cards and users."""
    columns = [
        column("ttft", "TTFT", "ms", "published; here measured, mean", "ttft"),
        column("tpot", "TPOT", "ms", "published; here measured, mean", "tpot"),
        column("tokens", "output", "tokens/s", "published; here measured", "tokens_s"),
        column(
            "users", "users with P99 < 3 s", "", "published; here of the first token, of those tried", "concurrency"
        ),
        column("per_watt", "output", "tokens/s per W", "published; here of the boards", "tokens_watt"),
    ]
    per_watt, none = dict(PER_WATT_B), "not stated"
    rows = []
    for one in CLAIMS:
        if one.card != "RTX 4090D" or one.weight_bits != 16:
            continue
        name = f"{one.count}x {one.card}" if one.count > 1 else one.card
        cells = {
            "ttft": cell(one.ttft_ms), "tpot": cell(one.tpot_ms), "tokens": cell(one.tokens_per_s), "users": cell(one.users, none),
            "per_watt": cell(per_watt.get(name), none),
        }  # fmt: skip
        rows.append(row(f"{one.name} (published)", none, cells))
    for entry in found.tables[NAME]["rows"]:
        label, kept = entry["label"], ("ttft", "tpot", "tokens", "per_watt")
        cells = {key: found.cell(NAME, label, key) for key in kept}
        within = found.cell(SUMMARY, label.partition(",")[0], "ttft")
        cells["users"] = within if found.p99_s == 3 else cell(None, f"measured for P99 < {found.p99_s:g} s")
        rows.append(row(f"here, {label}", entry["window"], cells))
    note = "The study's 125 tokens/s on four cards are of several users at once (see above). The same GPUs, one against several, are ours alone."
    return table("study-b-gpus", "Study B: one card against several", "machine", columns, rows, note)


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
