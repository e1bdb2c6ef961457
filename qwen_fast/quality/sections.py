"""A report's sections: tables and plots from the measurements, in the shapes of cost.tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..cost.tables import cell, plot, row, section, series, table
from .score import METRICS

MOST_DETAILS = 8  # cells with tables of their own
_JSON = ("json_valid", "json_equal", "schema_valid", "fields_right", "other_field", "other_record", "invented", "wrong_type",
         "fields_missing", "fields_extra")  # fmt: skip
_TOOLS = (
    "tool_decision",
    "tool_count",
    "tool_name",
    "tool_schema",
    "tool_arguments",
    "argument_fields",
    "argument_misplaced",
)
_OTHERS = ("number", "recall", "wrong_from_prompt")
REFERENCE = "reference"
Cells = Sequence[Mapping[str, Any]]


def column(key: str, title: str, unit: str, method: str, definition: str) -> dict[str, str]:
    return {"key": key, "title": title, "unit": unit, "method": method, "definition": definition}


def percent(found: Mapping[str, Any] | None, why: str = "no such rows") -> dict[str, Any]:
    """An estimate of a share as a cell in points of a hundred."""
    if found is None or found["value"] is None:
        return cell(None, why)
    low, high = (None if end is None else 100 * end for end in (found["low"], found["high"]))
    return cell(100 * found["value"], None, low, high)


def bare(found: Mapping[str, Any]) -> dict[str, Any]:
    """A share in points of a hundred without its interval, which the JSON has: Wilson's is not symmetric."""
    return percent({**found, "low": None})


def points(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An end of an interval."""
    return cell(None if found[key] is None else 100 * found[key], "no interval")


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return cell(found["value"], None, found["low"], found["high"])


def _rows(cells: Cells, keys: Sequence[str], make: Any, window: Any) -> list[dict[str, Any]]:
    """A row for each cell; what was not measured says why in every column."""
    found = []
    for one in cells:
        if one["status"] != "measured":
            missing = cell(None, f"{one['status']}: {one['why']}")
            found.append(row(one["label"], "", dict.fromkeys(keys, missing)))
        else:
            found.append(row(one["label"], window(one), make(one)))
    return found


def sections(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    cells: Cells = data["cells"]
    done = [one for one in cells if one["status"] == "measured"]
    has_text, has_tasks = any("text" in one for one in done), any("tasks" in one for one in done)
    found = [_overview(data, cells, has_text, has_tasks)]
    if has_text:
        found.append(_text(data, cells, done))
    if has_tasks:
        tasked = done[0]["tasks"]
        found.append(_tasks(cells, done))
        if any(name in tasked["all"]["metrics"] for name in (*_JSON, *_TOOLS)):
            found.append(_structure(cells, done))
        if tasked["recall"]:
            found.append(_recall(cells, done))
    return found


# -- the overview


def _overview(data: Mapping[str, Any], cells: Cells, has_text: bool, has_tasks: bool) -> dict[str, Any]:
    columns = [
        column("weights", "weights", "MiB", "counted: as loaded", "bytes"),
        column("kv", "KV cache", "bytes/token", "counted: from its layout", "bytes"),
    ]
    if has_text:
        columns += [
            column("ppl", "perplexity", "", "measured: teacher forced", "perplexity"),
            column("kl", "mean KL", "nats", "measured: against the reference", "kl"),
            column("p99", "KL, 99 %", "nats", "measured: nearest rank", "kl"),
            column("top", "same top-1", "%", "measured: of all positions", "same_top"),
        ]
    if has_tasks:
        columns += [
            column("exact", "exact match", "%", "measured: all rows", "exact"),
            column("difference", "difference", "points", "paired bootstrap", "difference"),
            column("broken", "broken", "rows", "right in the reference only", "changes"),
            column("fixed", "fixed", "rows", "right in the measured only", "changes"),
            column("p", "p", "", "McNemar, exact", "changes"),
        ]

    def make(one: Mapping[str, Any]) -> dict[str, Any]:
        about = one["about"]
        found = {"weights": cell(about["weights_bytes"] / 2**20), "kv": cell(about["kv_token_bytes"])} if (
            "weights_bytes" in about) else dict.fromkeys(("weights", "kv"), cell(None, "not known"))  # fmt: skip
        if has_text:
            text = one["text"]
            found |= {"ppl": plain(text["perplexity"]), "kl": plain(text["kl_mean"]), "p99": plain(text["kl_p99"])}
            found["top"] = percent(text["same_top"])
        if has_tasks:
            group = one["tasks"]["all"]
            found |= {"exact": bare(group["metrics"]["exact"]["measured"])}
            found |= {"difference": percent(group["metrics"]["exact"]["difference"])}
            found |= {"broken": cell(group["broken"]), "fixed": cell(group["fixed"]), "p": cell(group["p"])}
        return found

    rows = _rows(cells, [one["key"] for one in columns], make, _window)
    base = _reference_row(data, cells, columns)
    title = "Each cell against the reference"
    note = f"Reference: {described(data['reference'])}."
    return section("overview", "Overview", _lead(cells), [table("cells", title, "cell", columns, [base, *rows], note)],
                   _overview_plots(cells, has_text, has_tasks))  # fmt: skip


def _reference_row(data: Mapping[str, Any], cells: Cells, columns: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    about = data["reference"]
    found = {one["key"]: cell(None, "is the reference") for one in columns}
    if "weights_bytes" in about:
        found |= {"weights": cell(about["weights_bytes"] / 2**20), "kv": cell(about["kv_token_bytes"])}
    done = next((one for one in cells if one["status"] == "measured"), None)
    if done is not None and "text" in done:
        found["ppl"] = plain(done["text"]["perplexity_reference"])
    if done is not None and "tasks" in done:
        found["exact"] = bare(done["tasks"]["all"]["metrics"]["exact"]["reference"])
    return row(REFERENCE, "", found)


def _lead(cells: Cells) -> str:
    counts = {
        status: sum(one["status"] == status for one in cells)
        for status in ("measured", "refused", "failed", "not begun")
    }
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}: {said}. KL divergence is the most sensitive figure, exact match the one that users feel."


def _window(one: Mapping[str, Any]) -> str:
    parts = []
    if "text" in one:
        parts.append(f"{one['text']['positions']:,} positions")
    if "tasks" in one:
        parts.append(f"{one['tasks']['all']['rows']:,} rows")
    return ", ".join(parts)


def described(about: Mapping[str, Any]) -> str:
    """A model in a line."""
    if "quantization" not in about:
        return str(about.get("model", "the reference"))
    return (
        f"{about['model']} on {about['description']}: weights {about['quantization']}, dtype {about['dtype']}, activations "
        f"{about['activation_dtype']}, head {about['lm_head_dtype']}, KV cache {about['kv_cache_dtype']}"
    )


def _overview_plots(cells: Cells, has_text: bool, has_tasks: bool) -> list[dict[str, Any]]:
    found = []
    if has_text:
        found.append(
            _grouped("plot-kl", "Mean KL divergence", "nats", cells, lambda one: one["text"]["kl_mean"]["value"], True)
        )
    if has_tasks:
        found.append(_grouped("plot-wrong", "Answers not exact", "% of rows", cells,
                              lambda one: 100 - 100 * one["tasks"]["all"]["metrics"]["exact"]["measured"]["value"], False))  # fmt: skip
    return found


def _grouped(name: str, title: str, unit: str, cells: Cells, value: Any, log: bool) -> dict[str, Any]:
    """Bars: the last axis along x, a series for each combination of the others; cells without a figure have no bar."""
    places = [
        (", ".join(list(one["axes"].values())[:-1]), (list(one["axes"].values()) or [one["label"]])[-1])
        for one in cells
    ]
    labels, groups = list(dict.fromkeys(last for _, last in places)), list(dict.fromkeys(first for first, _ in places))
    points: dict[str, list[list[float]]] = {group: [] for group in groups}
    for one, (first, last) in zip(cells, places):
        if one["status"] == "measured":
            points[first].append([labels.index(last), value(one)])
    values = [point[1] for some in points.values() for point in some]
    log = log and bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    lines = [series(group or title, some) for group, some in points.items()]
    return plot(name, title, "bars", ("", ""), (title, unit), lines, "from the table below", labels=labels, log_y=log)


# -- text


def _text(data: Mapping[str, Any], cells: Cells, done: Cells) -> dict[str, Any]:
    columns = [
        column("reference", "perplexity, reference", "", "measured: teacher forced", "perplexity"),
        column("ppl", "perplexity", "", "measured: teacher forced", "perplexity"),
        column("ratio", "ratio", "", "measured over reference", "perplexity_ratio"),
        column("kl", "mean KL", "nats", "mean over positions", "kl"),
        column("median", "median KL", "nats", "nearest rank", "kl"),
        column("p99", "KL, 99 %", "nats", "nearest rank", "kl"),
        column("max", "largest KL", "nats", "one position", "kl"),
        column("top", "same top-1", "%", "of all positions", "same_top"),
        column("rms", "RMS change of p", "", "of the token that follows", "rms_delta_p"),
    ]

    def make(one: Mapping[str, Any]) -> dict[str, Any]:
        text = one["text"]
        names = {"reference": "perplexity_reference", "ppl": "perplexity", "ratio": "perplexity_ratio", "kl": "kl_mean",
                 "median": "kl_median", "p99": "kl_p99", "rms": "rms_delta_p"}  # fmt: skip
        found = {key: plain(text[name]) for key, name in names.items()}
        return found | {"max": cell(text["kl_max"]), "top": percent(text["same_top"])}

    rows = _rows(cells, [one["key"] for one in columns], make, lambda one: f"{one['text']['positions']:,} positions")
    lines = [
        series(one["label"], [[100 * share, value] for share, value in one["text"]["kl_curve"]])
        for one in [one for one in done if one["text"]["kl_max"] > 0][:MOST_DETAILS]
    ]
    curve = plot("plot-curve", "KL divergence that a share of the positions do not exceed", "line", ("positions", "%"),
                 ("KL", "nats"), lines, f"of the first {MOST_DETAILS} cells whose distributions differ", log_y=True,
                 **({} if lines else {"why": "no distribution differs from the reference's"}))  # fmt: skip
    about = data["reference"]
    lead = (
        f"{about['text_tokens']:,} tokens in {about['windows']} windows of up to {data['settings']['window']}, teacher forced "
        f"through both models ({about['logits']})."
    )
    return section("text", "Text", lead, [table("text", "Next-token distributions", "cell", columns, rows)], [curve])


# -- tasks


def _tasks(cells: Cells, done: Cells) -> dict[str, Any]:
    first = done[0]["tasks"]
    tasks = list(first["by_task"])
    columns = [column("all", "all", "%", f"{first['all']['rows']} rows", "exact")]
    columns += [column(f"task-{task}", task, "%", f"{first['by_task'][task]['rows']} rows", "exact") for task in tasks]

    def shares(one: Mapping[str, Any], side: str) -> dict[str, Any]:
        found = {"all": bare(one["tasks"]["all"]["metrics"]["exact"][side])}
        return found | {
            f"task-{task}": bare(group["metrics"]["exact"][side]) for task, group in one["tasks"]["by_task"].items()
        }

    keys = [one["key"] for one in columns]
    rows = _rows(cells, keys, lambda one: shares(one, "measured"), lambda one: f"{one['tasks']['all']['rows']} rows")
    rows = [row(REFERENCE, f"{first['all']['rows']} rows", shares(done[0], "reference")), *rows]
    tables = [table("tasks", "Exact match by task", "cell", columns, rows)]
    tables += [_task_table(one, index) for index, one in enumerate(done[:MOST_DETAILS])]
    lead = "Greedy answers, no penalties, the same prompts for both. " + (
        f"The JSON has these tables for all {len(done)} cells; here are the first {MOST_DETAILS}."
        if len(done) > MOST_DETAILS
        else ""
    )
    return section("tasks", "Tasks", lead.strip(), tables, [])


def _paired(first: str) -> list[dict[str, str]]:
    """The columns of a table of pairs. first: the definition of what both are measured in."""
    return [
        column("reference", "reference", "%", "measured", first),
        column("measured", "measured", "%", "measured", first),
        column("from", "from", "%", "of the measured: lower end", "intervals"),
        column("to", "to", "%", "upper end", "intervals"),
        column("difference", "difference", "points", "paired", "difference"),
        column("low", "from", "points", "paired bootstrap: lower end", "intervals"),
        column("high", "to", "points", "upper end", "intervals"),
    ]


def _pair(found: Mapping[str, Any]) -> dict[str, Any]:
    ours, gap = found["measured"], found["difference"]
    return {
        "reference": bare(found["reference"]), "measured": bare(ours), "from": points(ours, "low"), "to": points(ours, "high"),
        "difference": bare(gap), "low": points(gap, "low"), "high": points(gap, "high"),
    }  # fmt: skip


def _task_table(one: Mapping[str, Any], index: int) -> dict[str, Any]:
    columns = [
        *_paired("exact"),
        column("broken", "broken", "rows", "right in the reference only", "changes"),
        column("fixed", "fixed", "rows", "right in the measured only", "changes"),
        column("p", "p", "", "McNemar, exact", "changes"),
    ]
    rows = []
    for name, group in {**one["tasks"]["by_task"], "all": one["tasks"]["all"]}.items():
        changes = {key: cell(group[key]) for key in ("broken", "fixed", "p")}
        rows.append(row(name, f"{group['rows']} rows", _pair(group["metrics"]["exact"]) | changes))
    return table(f"tasks-{index}", f"{one['label']}: exact match", "task", columns, rows)


# -- structured answers


def _structure(cells: Cells, done: Cells) -> dict[str, Any]:
    present = done[0]["tasks"]["all"]["metrics"]
    tables = []
    for name, title, wanted in (
        ("structure", "JSON answers", _JSON), ("tools", "Tool calls", _TOOLS), ("others", "Other figures", _OTHERS),
    ):  # fmt: skip
        names = [one for one in wanted if one in present]
        if not names:
            continue
        columns = [column(one, METRICS[one][0], "%", "measured", one) for one in names]

        def shares(one: Mapping[str, Any], side: str, names: Sequence[str] = names) -> dict[str, Any]:
            return {name: bare(one["tasks"]["all"]["metrics"][name][side]) for name in names}

        rows = _rows(cells, names, lambda one, shares=shares: shares(one, "measured"), lambda one: "")
        tables.append(table(name, title, "cell", columns, [row(REFERENCE, "", shares(done[0], "reference")), *rows]))
    tables += [_figure_table(one, index) for index, one in enumerate(done[:MOST_DETAILS])]
    lead = "Whether the form holds (valid JSON, the fields asked for, the tool's schema), and whether the right value stands in the right place."
    return section("structure", "Structured answers", lead, tables, [])


def _figure_table(one: Mapping[str, Any], index: int) -> dict[str, Any]:
    rows = [
        row(METRICS[name][0], METRICS[name][3], _pair(found)) for name, found in one["tasks"]["all"]["metrics"].items()
    ]
    return table(f"figures-{index}", f"{one['label']}: every figure", "figure", _paired("reference"), rows)


# -- recall


def _recall(cells: Cells, done: Cells) -> dict[str, Any]:
    buckets = done[0]["tasks"]["recall"]
    names = [_bucket(one) for one in buckets]
    columns = [
        column(f"bucket-{i}", name, "%", f"{one['rows']} rows", "recall_distance")
        for i, (name, one) in enumerate(zip(names, buckets))
    ]

    def shares(one: Mapping[str, Any], side: str) -> dict[str, Any]:
        return {f"bucket-{i}": bare(found["metrics"]["exact"][side]) for i, found in enumerate(one["tasks"]["recall"])}

    rows = _rows(cells, [one["key"] for one in columns], lambda one: shares(one, "measured"), lambda one: "")
    rows = [row(REFERENCE, "", shares(done[0], "reference")), *rows]
    known = [(i, one) for i, one in enumerate(buckets) if one["low"] is not None]
    lines = [(REFERENCE, done[0], "reference"), *((one["label"], one, "measured") for one in done[: MOST_DETAILS - 1])]
    drawn = [
        series(name, [[max(one["low"], 128), 100 * source["tasks"]["recall"][i]["metrics"]["exact"][side]["value"]] for i, one in known])
        for name, source, side in lines
    ]  # fmt: skip
    curve = plot("plot-recall", "Recall by distance", "line", ("at least so many tokens away (the first bucket at 128)", "tokens"),
                 ("recall", "%"), drawn if known else [], f"of the reference and the first {MOST_DETAILS - 1} cells", log_x=True,
                 **({} if known else {"why": "no distance is known"}))  # fmt: skip
    lead = "Values from the prompt, by the number of tokens between the value and the end of the prompt."
    return section(
        "recall", "Recall at a distance", lead, [table("recall", "Recall by distance", "cell", columns, rows)], [curve]
    )


def _bucket(one: Mapping[str, Any]) -> str:
    if one["low"] is None:
        return "not known"
    return f"{one['low']} to {one['high'] - 1}" if one["high"] is not None else f"{one['low']} and more"
