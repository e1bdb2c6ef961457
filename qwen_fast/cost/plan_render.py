"""Plans as text, HTML, plain data and plots."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..utils import format_bytes, format_count
from .money import format_money
from .study_b import SOURCE

if TYPE_CHECKING:
    from .choice import Choice
    from .planner import Plan
    from .speed import Estimate

Table = tuple[str, tuple[str, ...], Sequence[tuple[str, ...]]]  # title, columns, rows
PARTS = ("layers", "head", "embedding", "workspace", "kv_cache", "overhead")
PART_NAMES = {
    "layers": "layers' weights",
    "head": "head",
    "embedding": "embedding",
    "workspace": "workspace",
    "kv_cache": "KV cache",
    "overhead": "driver's context, modules",
}
TERM_NAMES = {
    "step": "beginning and end of a step",
    "linears": "linear layers",
    "layers": "between the kernels of a layer",
    "layer": "small kernels of a prompt's piece",
    "activations": "activations",
    "head": "head",
    "logits": "logits and sampling",
    "kv": "KV cache",
    "kv_long": "KV cache beyond 512 positions",
    "layers_long": "a layer's part beyond 512 positions",
    "attention": "attention's products",
    "exchange": "exchange between cards",
}


def seconds(value: float) -> str:
    for limit, unit in ((1e-3, 1e6), (1.0, 1e3)):
        if value < limit:
            return f"{value * unit:.3g} {'us' if unit == 1e6 else 'ms'}"
    return f"{value:,.3g} s" if value < 1000 else f"{value:,.0f} s"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count_users(count: int) -> str:
    return "1 user" if count == 1 else f"{count:,} users"


def between(one: Estimate, show: Any) -> tuple[str, str]:
    return show(one.value), f"{show(one.low)} to {show(one.high)}"


# --- tables -------------------------------------------------------------------------------------------------


def tables(made: Plan) -> list[Table]:
    """Everything that a plan says, as tables of texts."""
    found = [_asked(made), _memory(made)]
    if made.speed is not None:
        found += [_speed(made), _terms(made)]
    found += [_power(made)]
    if made.claims:
        found.append(_claims(made))
    if made.target is not None:
        found.append(_target(made))
    return [*found, ("Notes", ("",), [(note,) for note in made.notes])]


def _asked(made: Plan) -> Table:
    w, f, c = made.workload, made.formats, made.card
    how = {"one": "", "replicas": ", an engine on each", "tensor": ", the model cut over all"}[made.parallel]
    rows = [
        ("model", f"{made.shape.name}, {format_count(made.shape.parameters)} parameters"),
        ("weights", f"{f.weight_bits} bits, head {f.head_bits} bits, KV cache {f.kv}"),
        ("card", f"{made.count}x {c.name}{how}"),
        ("of one card", f"{format_bytes(c.memory_bytes)}, {c.bandwidth_gbs:,.0f} GB/s, {c.tflops:,.4g} TFLOP/s bf16"),
        (
            "workload",
            f"{count_users(w.users)} at once, {w.tokens_in:,} tokens in, {w.tokens_out:,} out, room for {w.context:,}",
        ),
    ]
    return "Asked", ("", ""), [tuple(row) for row in rows]


def _memory(made: Plan) -> Table:
    m, total = made.memory, made.card.memory_bytes
    rows = [
        (PART_NAMES[part], format_bytes(size), f"{size / total:.1%}")
        for part in PARTS
        if (size := getattr(m, f"{part}_bytes"))
    ]
    room = made.room_bytes
    rows.append(("together", format_bytes(m.total_bytes), f"{m.total_bytes / total:.1%}"))
    rows.append(("remains" if room >= 0 else "MISSING", format_bytes(abs(room)), f"{abs(room) / total:.1%}"))
    rows.append(("a token's cache", format_bytes(round(m.kv_token_bytes)), ""))
    longest, positions = made.max_context, made.shape.max_positions
    beyond = f" (the config has {positions:,} positions)" if longest > positions else ""
    said = f"{longest:,} tokens{beyond}" if longest else "none fits"
    rows.append(("longest context", said, f"for {count_users(made.workload.users)}"))
    rows.append(("most users", f"{made.max_users:,}" if made.max_users else "none fits", f"at {made.workload.context:,} tokens"))  # fmt: skip
    return f"Memory of one card: {'fits' if made.fits else 'DOES NOT FIT'}", ("", "bytes", "of the card"), rows


def _speed(made: Plan) -> Table:
    s = made.speed
    assert s is not None
    rows = [
        ("TTFT, alone", *between(s.ttft_s, seconds)),
        ("TTFT, others busy (middle)", *between(s.ttft_busy_s, seconds)),
        ("TTFT, all users at once (P99 at most)", *between(s.ttft_p99_s, seconds)),
        ("TPOT, prompts of others counted", *between(s.tpot_s, seconds)),
        ("decode step, no prompts", *between(s.step_s, seconds)),
        ("whole answer", *between(s.latency_s, seconds)),
        ("output tokens/s, all users", *between(s.tokens_per_s, number)),
        ("output tokens/s, a user", *between(s.user_tokens_per_s, number)),
        ("output tokens/s while decoding alone", *between(s.decode_tokens_per_s, number)),
    ]
    return f"Speed, predicted ({_bases(s)})", ("", "expected", "range"), rows


def _bases(s: Any) -> str:
    """Where the ranges come from; of the first token apart where it differs."""
    if s.ttft_s.basis == s.step_s.basis:
        return str(s.step_s.basis)
    return f"first token {s.ttft_s.basis}; the rest {s.step_s.basis}"


def _terms(made: Plan) -> Table:
    s = made.speed
    assert s is not None
    total = sum(s.terms_us.values())
    rows = [
        (TERM_NAMES.get(name) or TERM_NAMES[name.partition("_")[0]], seconds(value / 1e6), f"{value / total:.0%}")
        for name, value in sorted(s.terms_us.items(), key=lambda item: -item[1])
        if value > 0
    ]
    return "Where a decode step's time goes", ("", "time", "share"), rows


def _power(made: Plan) -> Table:
    rows = [("power", f"{made.watts:g} W" if made.watts is not None else "not measured", made.power_note)]
    joules = made.joules_per_1k_out
    rows.append(
        ("J per 1k output tokens", "not measured", "") if joules is None
        else ("J per 1k output tokens", number(joules), "watts / (tokens/s) x 1,000")
    )  # fmt: skip
    if made.speed is not None and made.watts is not None:
        rows.append(("tokens/s/W", number(made.speed.tokens_per_s.value / made.watts), ""))
    if made.money is None:
        rows.append(("money", "left out", "no prices given"))
        return "Power and money", ("", "", ""), rows
    for amount in made.money.amounts():
        rows.append(
            (f"{amount.way}, a million output tokens", format_money(amount.value, amount.currency), amount.arithmetic)
        )
    rows += [(way, "left out", why) for way, why in made.money.missing.items()]
    return "Power and money", ("", "", ""), rows


def _claims(made: Plan) -> Table:
    rows = []
    for claim in made.claims:
        rows += claim_rows(made, claim)
    return f"Beside {SOURCE}", ("", "it says", "predicted here", "range"), rows


def claim_rows(made: Plan, claim: Any) -> list[tuple[str, ...]]:
    """A claim beside the prediction for one user (and its number of users, where it gives one)."""
    one = made.at(1)
    rows: list[tuple[str, ...]] = []
    if one.speed is None:
        rows.append((claim.name, f"{claim.tokens_per_s:g} tokens/s", "does not fit the memory", ""))
    else:
        s = one.speed
        rows.append((f"{claim.name}: TTFT", f"{claim.ttft_ms:,.0f} ms", *between(s.ttft_s, seconds)))
        rows.append(("TPOT, one user", f"{claim.tpot_ms:g} ms", *between(s.tpot_s, seconds)))
        rows.append(_claimed_rate(made, claim, one))
    if claim.memory_gb is not None:
        rows.append(("memory, one user", f"{claim.memory_gb:g} GB", f"{one.memory.total_bytes / 1e9:.1f} GB", ""))
    if claim.users is not None:
        rows.append(("users with P99 < 3 s", f"{claim.users}", f"{users_within(made, 3.0)}", ""))
    own = claim.own_price_per_million()
    if own is not None:
        said = f"¥{claim.price_per_million:g} per M tokens"
        rows.append(("its price from its own figures", said, f"¥{own:.2f}", f"¥{claim.price_per_hour:g}/h / {claim.tokens_per_s:g} tokens/s"))  # fmt: skip
    return rows


def _claimed_rate(made: Plan, claim: Any, one: Plan) -> tuple[str, ...]:
    """Its tokens/s beside those of as many users as its TPOT makes of them."""
    users = max(1, round(claim.tokens_per_s * claim.tpot_ms / 1e3))
    speed = (one if users == 1 else made.at(users)).speed
    name = "tokens/s, one user" if users == 1 else f"tokens/s: {users} users by its own TPOT"
    if speed is None:
        return name, f"{claim.tokens_per_s:g}", "does not fit the memory", ""
    return name, f"{claim.tokens_per_s:g}", *between(speed.tokens_per_s, number)


def users_within(made: Plan, limit_s: float) -> int:
    """The most users whose first tokens all come within the limit when they ask at once, and who fit."""
    low, high = 0, made.max_users
    while low < high:
        middle = (low + high + 1) // 2
        speed = made.at(middle).speed
        low, high = (middle, high) if speed is not None and speed.ttft_p99_s.value <= limit_s else (low, middle - 1)
    return low


def _target(made: Plan) -> Table:
    assert made.target is not None
    verdict = "met, as predicted" if made.meets_target else "NOT met"
    return f"Target {made.target.text!r}: {verdict}", ("",), [(text,) for text in made.unmet]


def tables_of(found: Any) -> list[Table]:
    """Of a Plan, a Choice or a report."""
    from .planner import Plan

    if isinstance(found, Plan):
        return tables(found)
    return found.tables if hasattr(found, "tables") else _choice_tables(found)


# --- forms --------------------------------------------------------------------------------------------------


def plain(found: Sequence[Table]) -> str:
    lines: list[str] = []
    for title, _, rows in found:
        lines += [title] if not lines else ["", title]
        widths = [
            max(len(row[i]) for row in rows if i < len(row)) for i in range(max((len(r) for r in rows), default=0))
        ]
        lines += ["  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def as_html_tables(found: Sequence[Table]) -> str:
    parts = []
    for title, columns, rows in found:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns) if any(columns) else ""
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<h4>{html.escape(title)}</h4><table>{f'<tr>{head}</tr>' if head else ''}{body}</table>")
    return f"<div>{''.join(parts)}</div>"


def as_text(made: Plan) -> str:
    return plain(tables(made))


def as_html(made: Plan) -> str:
    return as_html_tables(tables(made))


def _finite(value: Any) -> Any:
    """Plain data: tuples as lists, and no infinities or NaN, which JSON has no form for."""
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(made: Plan) -> dict[str, Any]:
    data = asdict(made)
    data["memory"] |= {"planned_bytes": made.memory.planned_bytes, "total_bytes": made.memory.total_bytes}
    if made.target is not None:
        data["target"] |= {"met": made.meets_target}
    for claim, one in zip(data["claims"], made.claims):
        claim["own_price_per_million"] = one.own_price_per_million()
    return _finite(data)


def plot(made: Plan) -> Any:
    """See Plan.plot."""
    try:
        from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ImportError("plot() needs matplotlib: pip install matplotlib") from None
    from .planner import curve

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    below = 0.0
    for part in PARTS:
        size = getattr(made.memory, f"{part}_bytes") / 2**30
        left.bar(["planned"], [size], bottom=[below], label=f"{PART_NAMES[part]}: {size:.2f} GiB")
        below += size
    left.axhline(made.card.memory_bytes / 2**30, color="black", linestyle="--", label="of the card")
    left.set(ylabel="GiB", title=f"{made.shape.name} on {made.count}x {made.card.name}", ylim=(0, None))
    left.legend(fontsize="small")
    most = max(1, min(made.max_users, 512))
    counts = sorted({1, most, made.workload.users, *(2**i for i in range(most.bit_length()))})
    points = [(one.workload.users, one.speed) for one in curve(made, [n for n in counts if n <= most])]
    speeds = [(users, speed) for users, speed in points if speed is not None]
    users = [n for n, _ in speeds]
    right.plot(users, [s.tokens_per_s.value for _, s in speeds], marker="o", label="tokens/s, all users")
    right.fill_between(
        users, [s.tokens_per_s.low for _, s in speeds], [s.tokens_per_s.high for _, s in speeds], alpha=0.2
    )
    other = right.twinx()
    other.plot(users, [1e3 * s.tpot_s.value for _, s in speeds], color="tab:red", marker="s", label="TPOT")
    right.set(xlabel="users at once", ylabel="output tokens/s (predicted)", ylim=(0, None))
    if len(users) > 1:
        right.set_xscale("log", base=2)
    other.set(ylabel="TPOT, ms", ylim=(0, None))
    right.legend(handles=[*right.lines, *other.lines])
    return figure


# --- choices ------------------------------------------------------------------------------------------------


def _choice_tables(choice: Choice) -> list[Table]:
    rows = []
    for option in choice.options:
        s = option.plan.speed
        assert s is not None
        price = "no price given" if option.per_hour is None else f"{format_money(option.per_hour, choice.currency)}/h"
        million = "" if option.per_million_out is None else f"{format_money(option.per_million_out, choice.currency)}/M"
        cards = f"{option.plan.count}x {option.plan.card.name}"
        how = "" if option.plan.parallel == "one" else option.plan.parallel
        speed = (f"{number(s.tokens_per_s.value)} tokens/s", seconds(s.ttft_p99_s.value), seconds(s.tpot_s.value))
        rows.append((cards, how, price, million, *speed, option.arithmetic))
    columns = ("cards", "", "an hour", "output tokens", "all users", "P99 TTFT at most", "TPOT", "how")
    found: list[Table] = [(f"Reaches {choice.target.text!r}, as predicted; cheapest first", columns, rows)]
    if choice.refused:
        found.append(("Does not", ("cards", "why"), list(choice.refused)))
    if choice.best is None and choice.options:
        found.append(("Notes", ("",), [("no price was given for any of these: the cheapest cannot be said",)]))
    return found


def choice_text(choice: Choice) -> str:
    return plain(_choice_tables(choice))


def choice_html(choice: Choice) -> str:
    return as_html_tables(_choice_tables(choice))


def choice_json(choice: Choice) -> dict[str, Any]:
    def one(option: Any) -> dict[str, Any]:
        data = {name: getattr(option, name) for name in ("per_hour", "arithmetic", "per_million_out")}
        return {**data, "plan": as_json(option.plan)}

    return _finite({"target": asdict(choice.target), "currency": choice.currency, "options": list(map(one, choice.options)),
                    "refused": [{"cards": cards, "why": why} for cards, why in choice.refused]})  # fmt: skip
