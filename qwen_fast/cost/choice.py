"""Which cards reach a goal, and which of them for the least money an hour. Prices are yours: none is built in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .cards import CARDS, check_count, find_card
from .money import Prices, cost_of
from .planner import Plan, plan
from .shapes import Shape, find_shape
from .study_b import CLAIMS
from .targets import Target, parse_target

COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class CardPrice:
    """Of one card: rent an hour, or what buying it costs; `source` is shown beside it."""

    rent_per_hour: float | None = None
    hardware_price: float | None = None
    source: str = "given by you"


@dataclass(frozen=True)
class Option:
    """One kind and number of cards. per_hour: money of all its cards; None where no price was given."""

    plan: Plan
    per_hour: float | None
    arithmetic: str
    per_million_out: float | None


@dataclass(frozen=True)
class Choice:
    """Those that reach the goal, the cheapest first (those without a price last, fewer cards first), and those that do not,
    with the reason."""

    target: Target
    currency: str
    options: tuple[Option, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def best(self) -> Option | None:
        """The cheapest one with a price; None where none has one."""
        return next((option for option in self.options if option.per_hour is not None), None)

    def __str__(self) -> str:
        from .plan_render import choice_text

        return choice_text(self)

    def _repr_html_(self) -> str:
        from .plan_render import choice_html

        return choice_html(self)

    def to_json(self) -> dict[str, Any]:
        from .plan_render import choice_json

        return choice_json(self)


def study_b_prices() -> dict[str, CardPrice]:
    """The rents of study B, in yuan an hour: an assumption of its authors, not a price of today."""
    rents = [c for c in CLAIMS if c.price_per_hour is not None and c.count == 1]
    return {c.card: CardPrice(c.price_per_hour, None, "assumed: study B's rent, as published") for c in rents}


def parse_card_price(text: str) -> tuple[str, CardPrice]:
    """ "A10G=rent:4.8" or "RTX 4090=buy:16000", of one card. ValueError says what was wrong."""
    name, equals, rest = text.partition("=")
    kind, colon, number = rest.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not equals or not colon or kind.strip() not in ("rent", "buy") or not 0 < value < 1e12:
        raise ValueError(
            f"card price: cannot read {text!r}; write CARD=rent:PRICE (an hour) or CARD=buy:PRICE, above 0"
        )
    card, count = find_card(name)
    if count != 1:
        raise ValueError(f"card price: {text!r}: give the price of one card")
    return card.name, CardPrice(value, None) if kind.strip() == "rent" else CardPrice(None, value)


def choose(
    model: str | os.PathLike[str] | Shape,
    target: str | Target,
    *,
    cards: Iterable[str] | None = None,
    counts: Iterable[int] = COUNTS,
    card_prices: Mapping[str, CardPrice] | None = None,
    prices: Prices | None = None,
    **options: Any,
) -> Choice:
    """Tries every card (default: all that are known) and count, and ranks those that reach the goal.

    card_prices: by card, of one card. prices: currency, tariff, life and utilisation for all. options: as for plan(),
    without its card, count and watts.
    """
    wrong = sorted({"card", "count", "watts"} & options.keys())
    if wrong:
        raise TypeError(f"choose() does not take {', '.join(wrong)}")
    goal = parse_target(target) if isinstance(target, str) else target
    shape, common = find_shape(model), prices or Prices()
    given = {find_card(name)[0].name: price for name, price in (card_prices or {}).items()}
    found: list[Option] = []
    refused: list[tuple[str, str]] = []
    for name in CARDS if cards is None else cards:
        card = find_card(name)[0]
        for count in counts:
            made = plan(shape, card, count=check_count(count), target=goal, **options)
            if made.meets_target:
                found.append(_option(made, given.get(card.name), common))
                break
            if count == max(counts):
                reason = "; ".join(made.unmet) if made.fits else "it does not fit the memory"
                refused.append((f"{count}x {card.name}", reason))
    found.sort(key=lambda one: (one.per_hour is None, one.per_hour or 0.0, one.plan.count, one.plan.card.name))
    return Choice(goal, common.currency, tuple(found), tuple(refused))


def _option(made: Plan, price: CardPrice | None, common: Prices) -> Option:
    """An hour of all the cards: rent, or the wear of owned ones."""
    if price is None or made.speed is None:
        return Option(made, None, "no price given", None)
    scaled = replace(
        common,
        rent_per_hour=None if price.rent_per_hour is None else price.rent_per_hour * made.count,
        hardware_price=None if price.hardware_price is None else price.hardware_price * made.count,
    )
    money = cost_of(None, 3600.0, 0, round(made.speed.tokens_per_s.value * 3600), scaled)
    amount = money.rent or money.owned
    if amount is None:
        return Option(made, None, "no price given", None)
    said = f"{amount.arithmetic} [{price.source}]"
    return Option(made, amount.value, said, amount.per_million_out)
