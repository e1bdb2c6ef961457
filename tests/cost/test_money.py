"""Money: cases worked out by hand in three currencies, and prices that are no prices."""

from __future__ import annotations

import math

import pytest

from qwen_fast.cost.money import BreakEven, Prices, break_even, cost_of, format_money


def test_yuan_the_tariff_of_a_household():
    """1 kWh is 3.6 MJ. 7.2 MJ are 2 kWh; at ¥0.6 and PUE 1.5 that is ¥1.80, over 9,000 output tokens ¥0.20 a thousand."""
    money = cost_of(7.2e6, 3600.0, 1000, 9000, Prices("¥", electricity_per_kwh=0.6, pue=1.5))
    assert money.electricity.value == pytest.approx(1.8, rel=1e-12)
    assert money.electricity.per_thousand_out == pytest.approx(0.2, rel=1e-12)
    assert money.electricity.per_million_all == pytest.approx(180.0, rel=1e-12)
    assert money.electricity.arithmetic == "7.2e+06 J / 3,600,000 J/kWh x PUE 1.5 x ¥0.6/kWh"
    assert money.owned is None and money.missing["owned"] == "hardware_price is not given"
    assert [amount.way for amount in money.amounts()] == ["electricity"]


def test_dollars_owned_hardware():
    """$26,280 over 3 years at half use: 3 x 8,760 h x 0.5 = 13,140 h, so $2 an hour. 900 s are $0.50: for 250,000 output
    tokens $2 a million."""
    prices = Prices("$", hardware_price=26280, hardware_life_years=3, utilisation=0.5)
    money = cost_of(None, 900.0, 0, 250_000, prices)
    assert money.owned.value == pytest.approx(0.5, rel=1e-12)
    assert money.owned.per_million_out == pytest.approx(2.0, rel=1e-12)
    assert money.owned.arithmetic == "$26,280 / (3 years x 8,760 h x utilisation 0.5) x 900 s / 3,600 s/h"
    defaults = cost_of(None, 900.0, 0, 250_000, Prices("$", hardware_price=26280)).owned
    assert defaults.value == money.owned.value
    assert defaults.arithmetic.count("(default)") == 2


def test_euros_rent_and_an_api():
    """€3.60 an hour for 500 s: €0.50. An API at €1 in and €4 out takes for 100,000 and 50,000 tokens €0.10 + €0.20."""
    prices = Prices("€", rent_per_hour=3.6, api_price_in_per_million=1, api_price_out_per_million=4)
    money = cost_of(None, 500.0, 100_000, 50_000, prices)
    assert money.rent.value == pytest.approx(0.5, rel=1e-12)
    assert money.rent.per_million_out == pytest.approx(10.0, rel=1e-12)
    assert money.api.value == pytest.approx(0.3, rel=1e-12)
    assert money.api.arithmetic == "(100,000 in x €1 + 50,000 out x €4) / 1,000,000"
    assert str(money.api).startswith("€0.300 = (100,000 in")


def test_the_published_figure_of_study_b_by_its_own_inputs():
    """¥1.2 an hour at 20.8 tokens/s: 3,600 x 20.8 = 74,880 tokens an hour, ¥16.03 a million and not 4.3."""
    money = cost_of(None, 3600.0, 0, 74_880, Prices("¥", rent_per_hour=1.2))
    assert money.rent.per_million_out == pytest.approx(16.0256, abs=1e-4)


def test_break_even_of_owned_hardware():
    """$1,095 over 3 years: $1 a day. The API asks $4 a million out (and $0 of input here): 1 kWh at $0.10 made 100,000
    tokens, so of $0.40 the machine saves $0.30: $3 a million. $1 / $3 = 333,333 tokens a day, 3,333 requests of 100."""
    prices = Prices("$", 0.1, None, 1095, 3, None, None, 1, 4)
    money = cost_of(3.6e6, 100.0, 0, 100_000, prices)
    found = break_even(money, prices, requests=1000, seconds=100.0)
    assert isinstance(found, BreakEven)
    assert found.tokens_per_day == pytest.approx(1e6 / 3, rel=1e-12)
    assert found.requests_per_day == pytest.approx(1e4 / 3, rel=1e-12)
    assert found.reachable is True  # 1,000 tokens/s are 86.4 million a day
    slow = break_even(money, prices, requests=1000, seconds=100_000.0)
    assert slow.tokens_per_day == found.tokens_per_day and slow.reachable is False


def test_break_even_that_never_comes_or_cannot_be_known():
    dear = Prices("$", 1.0, None, 1095, 3, None, None, 1, 4)
    money = cost_of(3.6e6, 100.0, 0, 100_000, dear)
    never = break_even(money, dear, 1, 100.0)
    assert never.tokens_per_day is None and never.arithmetic.startswith("never: the electricity alone ($1.00)")
    no_api = Prices("$", 1.0, hardware_price=1)
    assert "are not both given" in break_even(cost_of(1.0, 1.0, 1, 1, no_api), no_api, 1, 1.0)
    rented = Prices("€", rent_per_hour=1.0, api_price_in_per_million=1, api_price_out_per_million=2)
    found = break_even(cost_of(None, 10.0, 0, 1_000_000, rented), rented, 1, 10.0, "rent")
    assert found.tokens_per_day == pytest.approx(12e6)  # €24 a day, €2 a million
    with pytest.raises(ValueError, match="way must be"):
        break_even(cost_of(None, 10.0, 0, 1, rented), rented, 1, 10.0, "gift")


@pytest.mark.parametrize(
    "name",
    [
        "electricity_per_kwh", "pue", "hardware_price", "hardware_life_years", "utilisation", "rent_per_hour",
        "api_price_in_per_million", "api_price_out_per_million",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, math.inf, -math.inf])
def test_what_is_no_price(name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got"):
        Prices(**{name: value})


def test_prices_of_the_wrong_kind():
    for value in ("1.5", True, [1]):
        with pytest.raises(TypeError, match="rent_per_hour must be a number or None"):
            Prices(rent_per_hour=value)
    with pytest.raises(ValueError, match="pue must be at least 1, got 0.9"):
        Prices(pue=0.9)
    with pytest.raises(ValueError, match="utilisation must be above 0 and at most 1, got 1.5"):
        Prices(utilisation=1.5)
    for currency in ("", "  ", "far too long", 3):
        with pytest.raises(ValueError, match="currency must be a symbol or code"):
            Prices(currency)


def test_missing_is_left_out_and_never_0():
    money = cost_of(None, None, 10, 10, Prices())
    assert money.amounts() == []
    assert set(money.missing) == {"electricity", "owned", "rent", "api"}
    everything = Prices("¥", 0.6, 1.2, 1, 1, 1, 1, 1, 1)
    unmeasured = cost_of(None, None, 10, 10, everything)
    assert unmeasured.missing == {
        "electricity": "energy is not measured",
        "owned": "device time is not measured",
        "rent": "device time is not measured",
    }
    assert cost_of(1.0, 1.0, 5, 0, everything).electricity.per_million_out is None  # no output tokens to lay it on


def test_figures_that_are_none():
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="joules must be at least 0"):
            cost_of(bad, 1.0, 1, 1, Prices())
        with pytest.raises(ValueError, match="device_seconds must be at least 0"):
            cost_of(1.0, bad, 1, 1, Prices())
    with pytest.raises(ValueError, match="tokens_out must be at least 0, got -1"):
        cost_of(1.0, 1.0, 1, -1, Prices())
    with pytest.raises(TypeError, match="tokens_in must be an integer"):
        cost_of(1.0, 1.0, 1.5, 1, Prices())


@pytest.mark.parametrize(
    "value, said",
    [(0.00036, "¥0.000360"), (0.0123456, "¥0.0123"), (0.5, "¥0.500"), (1.2, "¥1.20"), (99.5, "¥99.50"), (123.45, "¥123.5"), (12345.6, "¥12,346"), (0, "¥0")],
)  # fmt: skip
def test_amounts_are_written_with_three_digits(value, said):
    assert format_money(value, "¥") == said
