"""Plots as SVG text: lines, grouped bars, stacked bars. Colours are classes (s0 to s7) that the page's style sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from .tables import number

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
COLOURS = 8


def draw(plot: Mapping[str, Any]) -> str:
    """An <svg>; plots with `why` have nothing to draw: ValueError."""
    if plot.get("why") or not any(one["points"] for one in plot["series"]):
        raise ValueError(f"plot {plot['id']} has nothing to draw: {plot.get('why')}")
    if plot["kind"] == "line":
        return _lines(plot)
    if plot.get("horizontal"):
        return _horizontal(plot)
    if plot["kind"] == "stacked" and len(plot["labels"]) == 1:
        return _one_bar(plot)
    return _bars(plot)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span low to high."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(math.floor(high / step + 1e-9) - first + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        found += [factor * 10.0**power for factor in (1, 2, 5)]
    inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
    if len(inside) > 7:
        inside = [value for value in inside if str(f"{value:e}")[0] == "1"]
    return inside or [low, high]


def _axis_text(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 10_000:
        return f"{value / 1e3:g}k"
    return f"{value:,.10g}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


class _Scale:
    """Values to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool = False) -> None:
        if log:
            low = max(low, 1e-12)
        self.low, self.high = low, high if high > low else low + (abs(low) or 1.0)
        self.start, self.stop, self.log = start, stop, log

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def _open(plot: Mapping[str, Any], height: float = HEIGHT, width: float = WIDTH) -> str:
    title = escape(plot["title"])
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{title}" xmlns="http://www.w3.org/2000/svg">'


def _titled(axis: Mapping[str, str]) -> str:
    return escape(
        f"{axis['title']}, {axis['unit']}" if axis["unit"] and axis["title"] else axis["title"] or axis["unit"]
    )


def _y_axis(plot: Mapping[str, Any], y: _Scale, bottom: float = BOTTOM) -> list[str]:
    out = []
    for value in y.ticks():
        at = y(value)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">{_axis_text(value)}</text>')
    middle = (TOP + HEIGHT - bottom) / 2
    out.append(
        f'<text class="axis" transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{_titled(plot["y"])}</text>'
    )
    return out


def _lines(plot: Mapping[str, Any]) -> str:
    points = [point for one in plot["series"] for point in one["points"]]
    xs = [point[0] for point in points]
    bottoms = [point[1] for point in points]
    most = 1.25 * max(bottoms)  # whiskers beyond it are cut: they must not flatten the rest
    tops = [min(max(value for value in point[1:] if value is not None), max(most, point[1])) for point in points]
    bound = plot.get("bound")
    high = max([*tops, bound[0]] if bound else tops) * 1.06
    log_x, log_y = bool(plot.get("log_x")) and min(xs) > 0, bool(plot.get("log_y")) and min(bottoms) > 0
    low = min(bottoms) / 1.3 if log_y else min(0.0, min(bottoms))
    x = _Scale(min(xs), max(xs), LEFT + 10, WIDTH - RIGHT - 14, log_x)
    y = _Scale(low, high * (1.2 if log_y else 1), HEIGHT - BOTTOM, TOP, log_y)
    out = [_open(plot), *_y_axis(plot, y)]
    exact = sorted(set(xs))
    for value in exact if len(exact) <= 9 and log_x else x.ticks():
        out.append(
            f'<text class="tick" x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_axis_text(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text class="axis" x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{_titled(plot["x"])}</text>')
    if bound:
        at = y(bound[0])
        out.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(
            f'<text class="note" x="{WIDTH - RIGHT}" y="{at - 5:.1f}" text-anchor="end">{escape(bound[1])}</text>'
        )
    if plot.get("mark"):
        at = x(plot["mark"][0])
        out.append(f'<line class="bound" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="note" x="{at + 6:.1f}" y="{TOP + 12}">{escape(plot["mark"][1])}</text>')
    for index, one in enumerate(plot["series"]):
        out += _line(one, index, x, y, plot.get("point_labels"))
    return "".join([*out, "</svg>"])


def _line(one: Mapping[str, Any], index: int, x: _Scale, y: _Scale, labels: Sequence[str] | None) -> list[str]:
    points = one["points"]
    colour = f"s{index % COLOURS}"
    path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in points)
    out = [f'<polyline class="line {colour}" points="{path}"/>']
    for position, point in enumerate(points if len(points) <= 40 else ()):
        at_x, at_y = x(point[0]), y(point[1])
        said = f"{one['name']}: {number(point[0])}, {number(point[1])}"
        if len(point) == 4 and point[2] is not None:
            ends = (max(y.low, point[2]), min(y.high, point[3]))
            out.append(
                f'<line class="whisker {colour}" x1="{at_x:.1f}" x2="{at_x:.1f}" y1="{y(ends[0]):.1f}" y2="{y(ends[1]):.1f}"/>'
            )
            said += f" ({number(point[2])} to {number(point[3])})"
        out.append(
            f'<circle class="dot {colour}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.6"><title>{escape(said)}</title></circle>'
        )
        if labels and position < len(labels):
            out.append(f'<text class="note" x="{at_x + 7:.1f}" y="{at_y - 7:.1f}">{escape(labels[position])}</text>')
    return out


def _stacks(plot: Mapping[str, Any]) -> list[list[tuple[int, float]]]:
    """For each label: (series, value) of its parts."""
    found: list[list[tuple[int, float]]] = [[] for _ in plot["labels"]]
    for index, one in enumerate(plot["series"]):
        for position, value in one["points"]:
            found[position].append((index, value))
    return found


def _bars(plot: Mapping[str, Any]) -> str:
    stacked = plot["kind"] == "stacked"
    stacks = _stacks(plot)
    heights = [
        sum(value for _, value in parts) if stacked else max((v for _, v in parts), default=0.0) for parts in stacks
    ]
    log = bool(plot.get("log_y"))
    positive = [value for parts in stacks for _, value in parts if value > 0]
    low = min(positive) / 3 if log and positive else 0.0
    tilt = len(stacks) > 5
    bottom = 68 if tilt else 30
    y = _Scale(low, max([*heights, low * 1.01]) * (1.6 if log else 1.06), HEIGHT - bottom, TOP, log)
    out = [_open(plot), *_y_axis(plot, y, bottom)]
    room = (WIDTH - LEFT - RIGHT) / len(stacks)
    wide = min(48.0, room * 0.72)
    for position, parts in enumerate(stacks):
        middle = LEFT + room * (position + 0.5)
        out += _bar_group(plot, parts, middle, wide, y, stacked)
        label = escape(plot["labels"][position])
        place = f'x="{middle:.1f}" y="{HEIGHT - bottom + 17}" text-anchor="middle"'
        if tilt:
            place = f'transform="translate({middle + 4:.1f} {HEIGHT - bottom + 13}) rotate(-35)" text-anchor="end"'
        out.append(f'<text class="tick" {place}>{label}</text>')
    return "".join([*out, "</svg>"])


def _bar_group(
    plot: Mapping[str, Any], parts: list[tuple[int, float]], middle: float, wide: float, y: _Scale, stacked: bool
) -> list[str]:
    out, base = [], 0.0
    each = wide if stacked else wide / max(1, len(plot["series"]))
    for index, value in parts:
        left = middle - wide / 2 + (0 if stacked else index * each)
        top, bottom = y(base + value), y(max(base, y.low))
        said = escape(f"{plot['series'][index]['name']}: {number(value)} {plot['y']['unit']}")
        out.append(
            f'<rect class="bar s{index % COLOURS}" x="{left:.1f}" y="{min(top, bottom):.1f}" width="{max(each - 1, 1):.1f}" '
            f'height="{abs(bottom - top):.1f}"><title>{said}</title></rect>'
        )
        base += value if stacked else 0
    return out


def _one_bar(plot: Mapping[str, Any]) -> str:
    """A single stack, lying, with its shares written in it."""
    parts = [(one["name"], one["points"][0][1]) for one in plot["series"]]
    total = sum(value for _, value in parts) or 1.0
    width = 2 * WIDTH
    out, at, top, tall = [_open(plot, 88, width)], 2.0, 8, 50
    whole = width - 4
    for index, (name, value) in enumerate(parts):
        wide = whole * value / total
        said = f"{name}: {number(value)} {plot['y']['unit']}, {100 * value / total:.1f} %"
        out.append(
            f'<rect class="bar s{index % COLOURS}" x="{at:.1f}" y="{top}" width="{max(wide - 1.5, 0.5):.1f}" height="{tall}"><title>{escape(said)}</title></rect>'
        )
        if wide > 46:
            out.append(
                f'<text class="inbar" x="{at + wide / 2:.1f}" y="{top + tall / 2 + 4}" text-anchor="middle">{100 * value / total:.0f} %</text>'
            )
        at += wide
    said = f"{number(total)} {plot['y']['unit']} together"
    out.append(f'<text class="axis" x="2" y="{top + tall + 20}">{escape(said)}</text>')
    return "".join([*out, "</svg>"])


def _horizontal(plot: Mapping[str, Any]) -> str:
    """Bars to both sides of a zero line, one under the other, each with its label."""
    points = plot["series"][0]["points"]
    values = [point[1] for point in points]
    row, top = 24, 8
    left = min(280.0, max(210.0, 6.6 * max(len(label) for label in plot["labels"])))  # 6.6: a letter's width
    height = top + row * len(values) + 34
    low, high = min(0.0, *values), max(0.0, *values)
    x = _Scale(low - 0.08 * (high - low), high + 0.08 * (high - low), left + 34, WIDTH - 46)
    out = [_open(plot, height)]
    zero = x(0.0)
    out.append(f'<line class="grid strong" x1="{zero:.1f}" x2="{zero:.1f}" y1="{top}" y2="{height - 30}"/>')
    for position, value in enumerate(values):
        at = top + row * position
        end = x(value)
        colour = "s2" if value >= 0 else "s3"
        ends = points[position][2:]
        if len(ends) == 2 and None not in ends and ends[0] <= 0 <= ends[1]:
            colour += " pale"
        out.append(
            f'<rect class="bar {colour}" x="{min(zero, end):.1f}" y="{at + 4}" width="{max(abs(end - zero), 0.8):.1f}" height="{row - 8}"/>'
        )
        out.append(
            f'<text class="tick" x="{left:.0f}" y="{at + row / 2 + 4:.0f}" text-anchor="end">{escape(plot["labels"][position])}</text>'
        )
        place = (end + 5, "start") if value >= 0 else (end - 5, "end")
        out.append(
            f'<text class="note" x="{place[0]:.1f}" y="{at + row / 2 + 4:.0f}" text-anchor="{place[1]}">{value:+.0f} %</text>'
        )
    out.append(
        f'<text class="axis" x="{(left + WIDTH) / 2:.0f}" y="{height - 8}" text-anchor="middle">{_titled(plot["y"])}</text>'
    )
    return "".join([*out, "</svg>"])


def legend(plot: Mapping[str, Any], name: Callable[[str], str] = escape) -> str:
    """The names of the series beside their colours; empty for one series."""
    if len(plot["series"]) < 2:
        return ""
    parts = [
        f'<span><i class="s{index % COLOURS}"></i>{name(one["name"])}</span>'
        for index, one in enumerate(plot["series"])
    ]
    return f'<div class="legend">{"".join(parts)}</div>'
