"""From joules and device seconds to money, each amount with its arithmetic. No measuring here.

Three ways to pay are kept apart and never added up for the reader: the electricity of the run, the wear of owned hardware,
and rented hours. An API's price for the same tokens stands beside them. A price that is not given leaves its amount out,
with the reason; it is never taken as 0. Only the electricity tariff and PUE have stated defaults: PUE 1, and the tariff
that `qwen-fast cost` takes in ¥ (cost_cli.DEFAULT_TARIFF). How long owned hardware lasts and how much it is used have
defaults too, for where a hardware_price is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

JOULES_PER_KWH = 3_600_000
HOURS_PER_YEAR = 8_760  # 365 days
DAYS_PER_MONTH = 30
DEFAULT_LIFE_YEARS = 3.0
DEFAULT_UTILISATION = 0.5
WAYS = ("electricity", "owned", "rent", "api")


@dataclass(frozen=True)
class Prices:
    """What things cost. Every price is optional; None leaves out what it is needed for.

    currency: a symbol or code, written before amounts: "¥", "$", "€".
    electricity_per_kwh: tariff. pue: energy of the whole building per energy of the machine, at least 1; None: 1, which
        the arithmetic says.
    hardware_price: of all devices (or the whole machine) that ran the workload. hardware_life_years: written off over so
        many years (None: 3). utilisation: share of that life in which the hardware computes, above 0 and at most 1
        (None: 0.5).
    rent_per_hour: of the same devices.
    api_price_in_per_million, api_price_out_per_million: what a commercial API asks for a million prompt and output tokens.
    electricity_is_default: nobody gave the tariff, and reports say so.

    ValueError names the field where a price is 0, negative, infinite or NaN; TypeError where it is no number.
    """

    currency: str = "¥"
    electricity_per_kwh: float | None = None
    pue: float | None = None
    hardware_price: float | None = None
    hardware_life_years: float | None = None
    utilisation: float | None = None
    rent_per_hour: float | None = None
    api_price_in_per_million: float | None = None
    api_price_out_per_million: float | None = None
    electricity_is_default: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.currency, str) or not self.currency.strip() or len(self.currency) > 8:
            raise ValueError(f"currency must be a symbol or code of 1 to 8 characters, got {self.currency!r}")
        for one in fields(self)[1:-1]:
            value = getattr(self, one.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{one.name} must be a number or None, got {value!r}")
            if not math.isfinite(value) or value <= 0:
                raise ValueError(
                    f"{one.name} must be above 0 and finite, got {value}; leave it out where it is not known"
                )
        if self.pue is not None and self.pue < 1:
            raise ValueError(f"pue must be at least 1, got {self.pue}")
        if self.utilisation is not None and self.utilisation > 1:
            raise ValueError(f"utilisation must be above 0 and at most 1, got {self.utilisation}")

    @property
    def life_years(self) -> float:
        return DEFAULT_LIFE_YEARS if self.hardware_life_years is None else self.hardware_life_years

    @property
    def used_share(self) -> float:
        return DEFAULT_UTILISATION if self.utilisation is None else self.utilisation


@dataclass(frozen=True)
class Amount:
    """Money for a number of tokens. value: in the currency, for all of them. arithmetic: how it came about."""

    way: str  # one of WAYS
    value: float
    currency: str
    arithmetic: str
    tokens_in: int
    tokens_out: int

    def per_tokens(self, count: int, which: str = "out") -> float | None:
        """For `count` tokens, the whole amount laid on the output tokens ("out"), the prompt tokens ("in") or both
        ("all"). None where there were none of them."""
        tokens = {"in": self.tokens_in, "out": self.tokens_out, "all": self.tokens_in + self.tokens_out}[which]
        return self.value * count / tokens if tokens else None

    @property
    def per_thousand_out(self) -> float | None:
        return self.per_tokens(1_000)

    @property
    def per_million_out(self) -> float | None:
        return self.per_tokens(1_000_000)

    @property
    def per_million_all(self) -> float | None:
        return self.per_tokens(1_000_000, "all")

    def __str__(self) -> str:
        return f"{format_money(self.value, self.currency)} = {self.arithmetic}"


@dataclass(frozen=True)
class Money:
    """The ways to pay for one measured run. An amount is None where `missing` says why."""

    electricity: Amount | None
    owned: Amount | None
    rent: Amount | None
    api: Amount | None
    missing: dict[str, str] = field(default_factory=dict)

    def amounts(self) -> list[Amount]:
        """Those that are there, in the order of WAYS."""
        found = [getattr(self, way) for way in WAYS]
        return [amount for amount in found if amount is not None]


def cost_of(
    joules: float | None, device_seconds: float | None, tokens_in: int, tokens_out: int, prices: Prices
) -> Money:
    """The money of a run that took `joules` (None: not measured) and held the devices for `device_seconds` (None: not
    measured), while tokens_in prompt tokens and tokens_out output tokens went through. ValueError for figures below 0
    or not finite."""
    for name, value in (("joules", joules), ("device_seconds", device_seconds)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    for name, count in (("tokens_in", tokens_in), ("tokens_out", tokens_out)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")
    found: dict[str, Amount | None] = {}
    missing: dict[str, str] = {}
    work = (("electricity", _electricity(joules, prices)), ("owned", _owned(device_seconds, prices)))
    for way, answer in (*work, ("rent", _rent(device_seconds, prices)), ("api", _api(tokens_in, tokens_out, prices))):
        if isinstance(answer, str):
            found[way], missing[way] = None, answer
        else:
            found[way] = Amount(way, answer[0], prices.currency, answer[1], tokens_in, tokens_out)
    return Money(found["electricity"], found["owned"], found["rent"], found["api"], missing)


def _electricity(joules: float | None, prices: Prices) -> tuple[float, str] | str:
    if prices.electricity_per_kwh is None:
        return "electricity_per_kwh is not given"
    if joules is None:
        return "energy is not measured"
    pue = 1 if prices.pue is None else prices.pue
    said = "PUE 1 (not given)" if prices.pue is None else f"PUE {pue:g}"
    value = joules / JOULES_PER_KWH * pue * prices.electricity_per_kwh
    default = " (default)" if prices.electricity_is_default else ""
    tariff = f"{prices.currency}{prices.electricity_per_kwh:g}/kWh{default}"
    return value, f"{joules:,.6g} J / {JOULES_PER_KWH:,} J/kWh x {said} x {tariff}"


def _owned(seconds: float | None, prices: Prices) -> tuple[float, str] | str:
    if prices.hardware_price is None:
        return "hardware_price is not given"
    if seconds is None:
        return "device time is not measured"
    hours = prices.life_years * HOURS_PER_YEAR * prices.used_share
    value = prices.hardware_price / hours * seconds / 3600
    life = f"{prices.life_years:g} years{' (default)' if prices.hardware_life_years is None else ''}"
    used = f"{prices.used_share:g}{' (default)' if prices.utilisation is None else ''}"
    price = f"{prices.currency}{prices.hardware_price:,.10g}"
    return value, f"{price} / ({life} x {HOURS_PER_YEAR:,} h x utilisation {used}) x {seconds:,.6g} s / 3,600 s/h"


def _rent(seconds: float | None, prices: Prices) -> tuple[float, str] | str:
    if prices.rent_per_hour is None:
        return "rent_per_hour is not given"
    if seconds is None:
        return "device time is not measured"
    value = prices.rent_per_hour * seconds / 3600
    rate = f"{prices.currency}{prices.rent_per_hour:g}/h"
    return value, f"{rate} x {seconds:,.6g} s / 3,600 s/h; an hour rented and not used costs the same"


def _api(tokens_in: int, tokens_out: int, prices: Prices) -> tuple[float, str] | str:
    price_in, price_out = prices.api_price_in_per_million, prices.api_price_out_per_million
    if price_in is None or price_out is None:
        return "api_price_in_per_million and api_price_out_per_million are not both given"
    value = (tokens_in * price_in + tokens_out * price_out) / 1e6
    sign = prices.currency
    return value, f"({tokens_in:,} in x {sign}{price_in:g} + {tokens_out:,} out x {sign}{price_out:g}) / 1,000,000"


@dataclass(frozen=True)
class BreakEven:
    """From how many output tokens a day the own machine costs less than an API. tokens_per_day: None where it never does;
    `arithmetic` says why or how. reachable: whether one machine, working all day at the measured speed, gets there."""

    tokens_per_day: float | None
    requests_per_day: float | None
    reachable: bool | None
    arithmetic: str


def break_even(money: Money, prices: Prices, requests: int, seconds: float, way: str = "owned") -> BreakEven | str:
    """The output tokens a day from which `way` ("owned", with its electricity where that is known, or "rent") costs less
    than the API. The hardware, or the rent of 24 hours, is paid whether it works or not.

    requests, seconds: how many requests the run had, and how long it took. A text where something is not given.
    """
    api = money.api
    if api is None:
        return money.missing["api"]
    if way == "owned":
        if prices.hardware_price is None:
            return money.missing["owned"]
        fixed = prices.hardware_price / (prices.life_years * 365)
        fixed_said = f"{prices.currency}{prices.hardware_price:,.10g} / ({prices.life_years:g} years x 365 days)"
    elif way == "rent":
        if prices.rent_per_hour is None:
            return money.missing["rent"]
        fixed, fixed_said = prices.rent_per_hour * 24, f"{prices.currency}{prices.rent_per_hour:g}/h x 24 h"
    else:
        raise ValueError(f"way must be 'owned' or 'rent', got {way!r}")
    if api.tokens_out == 0 or requests < 1 or not seconds > 0:
        return "the run had no output tokens"
    power = money.electricity.value if way == "owned" and money.electricity is not None else 0.0
    note = "" if way == "rent" or power else "; electricity is not counted: " + money.missing.get("electricity", "")
    saved = (api.value - power) / api.tokens_out
    if saved <= 0:
        said = f"the electricity alone ({format_money(power, api.currency)}) costs as much as the API"
        return BreakEven(None, None, False, f"never: {said} ({format_money(api.value, api.currency)}){note}")
    tokens = fixed / saved
    capacity = api.tokens_out / seconds * 86_400
    each = f"(API {format_money(api.value, api.currency)} - electricity {format_money(power, api.currency)})"
    if not power:
        each = f"(API {format_money(api.value, api.currency)})"
    said = f"{fixed_said} a day / ({each} / {api.tokens_out:,} output tokens)"
    reach = f"one machine makes {capacity:,.0f} a day at the measured {api.tokens_out / seconds:,.1f} tokens/s"
    return BreakEven(tokens, tokens * requests / api.tokens_out, tokens <= capacity, f"{said}; {reach}{note}")


def format_money(value: float, currency: str) -> str:
    """¥0.00036, ¥12.40, ¥1,234: three significant digits at least, cents at least from 1 on."""
    if value == 0:
        return f"{currency}0"
    if abs(value) >= 100:
        return f"{currency}{value:,.0f}" if abs(value) >= 1000 else f"{currency}{value:,.1f}"
    if abs(value) >= 1:
        return f"{currency}{value:.2f}"
    return f"{currency}{value:.{2 - math.floor(math.log10(abs(value)))}f}"
