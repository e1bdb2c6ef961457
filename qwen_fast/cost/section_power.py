"""Section 4: watts, joules and money, each with the arithmetic that leads to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .derive import Derived, loads_of
from .money import DAYS_PER_MONTH, Amount, BreakEven, Money, Prices, break_even, cost_of, format_money
from .section_time import by_workload, label
from .statistics import Interval
from .tables import Cell, around, cell, column, number, plot, row, section, series, table

WAYS = {"electricity": "electricity", "owned": "owned hardware", "rent": "hourly rent", "api": "commercial API"}
LEVELS = ("low", "medium", "high")


class Bill:
    """Energy and money of one load. joules: metered, else from a reading at the wall where one was entered."""

    def __init__(self, one: Derived, data: Mapping[str, Any], prices: Prices) -> None:
        self.one = one
        first = data["workloads"][0]["name"]
        walls = data["settings"]["wall_watts"] if one.load["workload"] == first else {}
        self.wall_watts: float | None = walls.get(str(one.users))
        self.joules = one.joules if self.wall_watts is None else self.wall_watts * one.seconds
        self.money: Money = cost_of(self.joules, one.seconds, one.tokens_in, one.tokens_out, prices)

    @property
    def source(self) -> str:
        if self.wall_watts is not None:
            return f"entered: a wall meter read {self.wall_watts:g} W"
        return "metered" if self.joules is not None else (self.one.why_energy or "not measured")


def power_section(data: Mapping[str, Any]) -> dict[str, Any]:
    prices = Prices(**data["prices"])
    bills = {key: Bill(one, data, prices) for key, one in loads_of(data).items()}
    tables = [
        _energy(bills, data), _sources(data), _money(bills, prices, "power-money-1k", 1_000, "1,000"),
        _money(bills, prices, "power-money-1m", 1_000_000, "a million"), _volume(bills, prices, data, 1),
        _volume(bills, prices, data, DAYS_PER_MONTH), _break_even(bills, prices, "owned"), _break_even(bills, prices, "rent"), _arithmetic(bills, data),
    ]  # fmt: skip
    plots = [_joules_plot(bills), _money_plot(bills, prices)]
    return section("power", "Power and money", _lead(bills, prices), tables, plots)


def _lead(bills: Mapping[str, Bill], prices: Prices) -> str:
    if not bills:
        return "No load was measured."
    parts = []
    metered = [bill for bill in bills.values() if bill.joules is not None and bill.one.tokens_out]
    if metered:
        best = min(metered, key=lambda bill: (bill.joules or 0.0) / bill.one.tokens_out)
        joules = 1000 * (best.joules or 0.0) / best.one.tokens_out
        parts.append(f"The least energy: {number(joules)} J per 1,000 output tokens: {label(best.one)}.")
    else:
        parts.append(f"Energy: {next(iter(bills.values())).source}.")
    priced = [
        amount
        for bill in bills.values()
        for amount in bill.money.amounts()
        if amount.way != "api" and amount.tokens_out
    ]
    if priced:
        cheap = min(priced, key=lambda amount: amount.per_million_out or 0.0)
        value = format_money(cheap.per_million_out or 0.0, prices.currency)
        parts.append(f"The least money: {value} per million output tokens by {WAYS[cheap.way]}.")
    else:
        parts.append("Money: no price applies; give --electricity, --hardware-price or --rent-per-hour.")
    return " ".join(parts)


def _energy(bills: Mapping[str, Bill], data: Mapping[str, Any]) -> dict[str, Any]:
    counter = "measured: energy counter over wall time"
    columns = [
        column("busy", "device busy", "%", "measured: time with a step in flight", "busy"),
        column("watts", "power", "W", counter, "watts"),
        column("idle", "idle power", "W", "measured: before the loads", "watts"),
        column("gross", "gross", "J per 1,000 output tokens", "measured: counter over tokens", "joules"),
        column("net", "net", "J per 1,000 output tokens", "computed: less idle power", "joules"),
        column("in", "prompts", "J per 1,000 prompt tokens", "estimate: by share of device time", "joules_in"),
        column("out", "output alone", "J per 1,000 output tokens", "estimate: by share of device time", "joules_out"),
    ]
    rows = []
    for bill in bills.values():
        one = bill.one
        watts: Interval | None = one.watts
        gross = one.joules_per_1k()
        if bill.wall_watts is not None and one.ms_per_token is not None:
            watts = Interval(bill.wall_watts, None, None, 1)
            gross = Interval(bill.wall_watts * one.ms_per_token.mean, None, None, 1)
        why = one.why_energy
        no_idle = why or "not measured: no idle baseline"
        cells = {
            "busy": around(one.busy),
            "watts": around(watts, 1, why),
            "idle": cell(one.idle_watts, no_idle),
            "gross": around(gross, 1, why),
            "net": around(one.joules_per_1k(net=True) if bill.wall_watts is None else None, 1, no_idle),
            "in": _phase(bill, True),
            "out": _phase(bill, False),
        }
        entered = "; power entered from a wall meter" if bill.wall_watts is not None else ""
        rows.append(row(label(one), one.load["window"] + entered, cells))
    note = "GPU board or CPU package only, unless a wall meter's reading was entered: host, fans, power supply and cooling come on top."
    return table("power-energy", "Energy", "load", columns, rows, note)


def _phase(bill: Bill, prefill: bool) -> Cell:
    one, share = bill.one, bill.one.prefill_share
    tokens = one.computed_in if prefill else one.tokens_out
    if bill.joules is None or share is None or not tokens:
        return cell(None, one.why_energy or "not measured: no device time by phase")
    return cell(1000 * bill.joules * (share if prefill else 1 - share) / tokens)


def _sources(data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [column("watts", "idle power", "W", "measured: before the loads", "watts")]
    idle = (data["stages"].get("idle") or {}).get("watts") or {}
    rows = []
    for source in data["meter"].get("sources", ()):
        why = f"not measured: {source.get('note') or 'no reading'}"
        rows.append(row(source["name"], source["kind"], {"watts": cell(idle.get(source["name"]), why)}))
    if not rows:
        why = data["meter"].get("why", "the meter has no energy source")
        rows.append(row("none", "none", {"watts": cell(None, f"not measured: {why}")}))
    return table("power-sources", "Energy counters", "counter", columns, rows)


def _money(bills: Mapping[str, Bill], prices: Prices, name: str, count: int, said: str) -> dict[str, Any]:
    """Money for `count` output tokens, by way of paying."""
    method = "computed: see the arithmetic below"
    unit = f"{prices.currency} per {said.removeprefix('a ')} output tokens"
    columns = [column(way, title, unit, method, "money") for way, title in WAYS.items()]
    rows = []
    for bill in bills.values():
        cells = {}
        for way in WAYS:
            amount: Amount | None = getattr(bill.money, way)
            cells[way] = cell(amount.per_tokens(count) if amount else None, _why(bill, way))
        rows.append(row(label(bill.one), bill.one.load["window"], cells))
    return table(name, f"Money for {said} output tokens, by way of paying", "load", columns, rows, _prices_said(prices))


def _why(bill: Bill, way: str) -> str:
    reason = bill.money.missing.get(way, "no output tokens")
    if reason == "energy is not measured":
        return bill.source
    return f"not given: {reason.removesuffix(' is not given').removesuffix(' are not both given')}"


def _prices_said(prices: Prices) -> str:
    given = []
    sign = prices.currency
    if prices.electricity_per_kwh is not None:
        pue = "1 (default)" if prices.pue is None else f"{prices.pue:g}"
        default = " (default)" if prices.electricity_is_default else ""
        given.append(f"electricity {sign}{prices.electricity_per_kwh:g}/kWh{default}, PUE {pue}")
    if prices.hardware_price is not None:
        life = f"{prices.life_years:g} years{' (default)' if prices.hardware_life_years is None else ''}"
        used = f"{100 * prices.used_share:g} %{' (default)' if prices.utilisation is None else ''}"
        given.append(f"hardware {sign}{prices.hardware_price:,.10g} over {life}, used {used} of the time")
    if prices.rent_per_hour is not None:
        given.append(f"rent {sign}{prices.rent_per_hour:g}/h")
    if prices.api_price_in_per_million is not None and prices.api_price_out_per_million is not None:
        both = f"{sign}{prices.api_price_in_per_million:g} in, {sign}{prices.api_price_out_per_million:g} out"
        given.append(f"API per million tokens: {both}")
    return (
        "Prices: "
        + ("; ".join(given) if given else "none given")
        + ". What has no price is left out; the ways are not added up."
    )


def _volume(bills: Mapping[str, Bill], prices: Prices, data: Mapping[str, Any], days: int) -> dict[str, Any]:
    daily = data["settings"]["tokens_per_day"]
    span = "day" if days == 1 else f"{days} days"
    unit = f"{prices.currency} per {span}"
    columns = [column("hours", "machine time", f"h per {span}", "computed: volume over measured tokens/s", "money")]
    columns += [
        column(way, title, unit, "computed: volume times the cost of a token", "money") for way, title in WAYS.items()
    ]
    rows = []
    for bill in bills.values():
        rate = bill.one.tokens_s
        hours = days * daily / rate.mean / 3600 if rate and rate.mean else None
        cells = {"hours": cell(hours, "not measured: no output tokens")}
        for way in WAYS:
            amount = getattr(bill.money, way)
            each = amount.per_tokens(1) if amount else None
            cells[way] = cell(None if each is None else each * daily * days, _why(bill, way))
        rows.append(row(label(bill.one), f"{days * daily:,.0f} output tokens", cells))
    note = f"Above {24 * days} h of machine time, that many times {24 * days} h says how many machines it takes."
    name = "power-day" if days == 1 else "power-month"
    return table(
        name, f"A {'day' if days == 1 else 'month'} of {daily:,.0f} output tokens a day", "load", columns, rows, note
    )


def _break_even(bills: Mapping[str, Bill], prices: Prices, way: str) -> dict[str, Any]:
    columns = [
        column("tokens", "cheaper from", "output tokens per day", "computed: see the arithmetic", "break_even"),
        column("requests", "or from", "requests per day", "computed: at this workload's lengths", "break_even"),
        column("reach", "reached by one machine", "yes or no", "computed: measured tokens/s for 24 h", "break_even"),
        column("how", "arithmetic", "", "computed: every factor written out", "break_even"),
    ]
    rows = []
    for bill in bills.values():
        found = break_even(bill.money, prices, max(1, bill.one.finished), bill.one.seconds, way)
        if isinstance(found, BreakEven):
            cells = {
                "tokens": cell(found.tokens_per_day, "never"),
                "requests": cell(found.requests_per_day, "never"),
                "reach": cell("yes" if found.reachable else "no"),
                "how": cell(found.arithmetic),
            }
        else:
            why = f"not given: {found.removesuffix(' is not given').removesuffix(' are not both given')}"
            cells = {one["key"]: cell(None, why) for one in columns}
        rows.append(row(label(bill.one), bill.one.load["window"], cells))
    title = f"From what volume {WAYS[way]} is cheaper than the API"
    return table(f"power-break-even-{way}", title, "load", columns, rows)


def _arithmetic(bills: Mapping[str, Bill], data: Mapping[str, Any]) -> dict[str, Any]:
    columns = [column("how", "from measured figures to money", "", "computed: every factor written out", "money")]
    rows = []
    for bill in bills.values():
        for amount in bill.money.amounts():
            each = amount.per_thousand_out
            per = "no output tokens" if each is None else f"{format_money(each, amount.currency)} per 1,000"
            text = f"{amount}; over {amount.tokens_out:,} output tokens: {per}"
            rows.append(row(f"{label(bill.one)}: {WAYS[amount.way]}", f"{bill.one.seconds:.2f} s", {"how": cell(text)}))
    if not rows:
        rows.append(row("no amount", "none", {"how": cell(None, "not given: no price applies to what was measured")}))
    return table("power-arithmetic", "The arithmetic", "amount", columns, rows)


# -- plots


def _joules_plot(bills: Mapping[str, Bill]) -> dict[str, Any]:
    lines = []
    by_key = {id(bill.one): bill for bill in bills.values()}
    for name, group in by_workload({key: bill.one for key, bill in bills.items()}).items():
        points = []
        for one in group:
            joules = by_key[id(one)].joules
            if joules is not None and one.tokens_out:
                points.append((one.users, 1000 * joules / one.tokens_out))
        if points:
            lines.append(series(name, points))
    why = next((bill.source for bill in bills.values() if bill.joules is None), "not measured: no load was run")
    more = {} if lines else {"why": why}
    return plot(
        "plot-joules", "Energy for 1,000 output tokens", "line", ("users", "count"), ("gross", "J per 1,000 output tokens"),
        lines, "measured: energy counter over output tokens", log_x=True, **more,
    )  # fmt: skip


def _money_plot(bills: Mapping[str, Bill], prices: Prices) -> dict[str, Any]:
    lines = []
    listed = list(bills.values())
    for way, title in WAYS.items():
        points = []
        for position, bill in enumerate(listed):
            amount = getattr(bill.money, way)
            if amount is not None and amount.per_million_out is not None:
                points.append((position, amount.per_million_out))
        if points:
            lines.append(series(title, points))
    more = {} if lines else {"why": "not given: no price applies to what was measured"}
    labels = [f"{bill.one.load['workload']} x{bill.one.users}" for bill in listed]
    return plot(
        "plot-money", "Money for a million output tokens", "bars", ("", ""), ("cost", f"{prices.currency} per million output tokens"),
        lines, "computed from measured figures and the prices given", labels=labels, log_y=True, **more,
    )  # fmt: skip
