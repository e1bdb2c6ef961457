"""What the roofline says of a workload: times and rates, each with the range in which it is expected."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import roofline
from .cards import Card
from .memory import Formats
from .shapes import Shape

UNMEASURED_CARD = 1.5  # assumed (2026-11): a card never run on may take so many times as long, or as short
UNMEASURED_PART = 2.0  # assumed (2026-11): errors on a measured card, of a shape or format never run as a whole


@dataclass(frozen=True)
class Estimate:
    """A predicted value, with the range in which it is expected; `basis` says where the range comes from."""

    value: float
    low: float
    high: float
    basis: str


@dataclass(frozen=True)
class Workload:
    """tokens_in, tokens_out: of one request. users: requests at once, each followed by the next. context: positions that
    a user's cache has room for."""

    tokens_in: int
    tokens_out: int
    users: int
    context: int


@dataclass(frozen=True)
class Speed:
    """Seconds and tokens per second, with all users busy all the time.

    ttft_s: a prompt alone on the card. ttft_busy_s: the middle one, when the users do not ask at the same moment: the steps in
    flight end first, and now and then another's prompt. ttft_p99_s: when all users of a card ask at the same moment, the last one's: an
    upper bound of the 99th percentile. tpot_s: between two tokens of a user, prompts of others in between counted.
    latency_s: ttft_p99_s and the other tokens. step_s: a decode step of all users without prompts.
    tokens_per_s: output tokens of all cards and users, prompts' time counted. decode_tokens_per_s: not counted.
    """

    ttft_s: Estimate
    ttft_busy_s: Estimate
    ttft_p99_s: Estimate
    tpot_s: Estimate
    latency_s: Estimate
    step_s: Estimate
    tokens_per_s: Estimate
    user_tokens_per_s: Estimate
    decode_tokens_per_s: Estimate
    terms_us: dict[str, float]  # of the decode step


def users_per_card(users: int, count: int, parallel: str) -> int:
    return users if parallel == "tensor" else -(-users // count)


def ranks_of(count: int, parallel: str) -> int:
    return count if parallel == "tensor" else 1


def ranges(
    shape: Shape, formats: Formats, card: Card, count: int, parallel: str, step: roofline.Step, fitted: dict[str, Any]
) -> tuple[float, str]:
    """The factor by which a time may be off, and why. Of several cards as one (parallel "tensor") those numbers were measured
    that fit_parallel.py has rows of."""
    missing = roofline.is_measured(shape, formats, card, fitted)
    if step.decode and is_long(step, fitted):
        missing.append(f"{step.num_seqs} users beyond {fitted['contexts']['several']:g} positions")
    worst = fitted["error"]["held_out_factor"] - 1
    if parallel == "tensor":
        known = fitted["parallel"]
        worst = max(worst, known["factor"] - 1)
        if f"{shape.name}, {formats.weight_bits} bits" in known["models"] and formats.head_bits == 16:
            missing = [one for one in missing if one not in ("shape", "weights")]
        if count not in known["ranks"]:
            missing.append(f"{count} cards as one")
    if not missing:
        return 1 + worst, f"as measured: held-out runs were off by a factor of at most {1 + worst:.3f}"
    said = f"never measured: {', '.join(missing)}"
    if "card" in missing or any(one.endswith("as one") for one in missing):
        return UNMEASURED_CARD * (
            1 + worst
        ), f"{said}; a factor of {UNMEASURED_CARD:g} is assumed beside the fit's error"
    return 1 + UNMEASURED_PART * worst, f"{said}; {UNMEASURED_PART:g} times the error of held-out runs is assumed"


def is_long(step: roofline.Step, fitted: dict[str, Any]) -> bool:
    """Whether several users have longer contexts than in any run that was measured."""
    return step.num_seqs > 1 and step.context > fitted["contexts"]["several"]


@dataclass(frozen=True)
class Steady:
    """Seconds of a steady state, as the terms give them. rate: output tokens a second of one card."""

    step_s: float
    prompt_s: float
    tpot_s: float
    ttft_busy_s: float
    rate: float
    terms_us: dict[str, float]


def steady(
    shape: Shape, formats: Formats, card: Card, workload: Workload, chunk: int, fitted: dict[str, Any], ranks: int = 1
) -> Steady:
    """workload.users: of one card. The others' tokens take their places in a prompt's steps. Two steps are in flight when a request comes, and a prompt of another is being computed
    for a share of the time: half of it is still to come, on average."""
    users, out = workload.users, workload.tokens_out
    step = roofline.Step(users, users, workload.tokens_in + out / 2, True, users)
    terms = roofline.terms(shape, formats, step, card, fitted, ranks)
    step_s = sum(terms.values()) / 1e6
    prompt_s = roofline.prefill_seconds(shape, formats, workload.tokens_in, chunk, card, fitted, ranks)
    places = max(1, chunk - (users - 1))
    busy_s = roofline.prefill_seconds(shape, formats, workload.tokens_in, places, card, fitted, ranks)
    cycle_s = out * step_s + users * busy_s
    others = (users - 1) * busy_s / cycle_s
    wait_s = 2 * step_s + others * busy_s / 2 if users > 1 else 0.0
    return Steady(step_s, prompt_s, step_s + (users - 1) * busy_s / out, busy_s + wait_s, users * out / cycle_s, terms)


def _long_gain(terms: dict[str, float], step: roofline.Step, fitted: dict[str, Any]) -> float:
    """How much quicker a step may be: the cache of several users was measured over short contexts, where reading it is
    slower for its size; over long ones it may go as fast as one user's."""
    cache, factors = terms.get("kv_graph", 0.0), fitted["factors"]
    if not is_long(step, fitted) or cache == 0.0:
        return 1.0
    total = sum(terms.values())
    return total / (total - cache * (1 - min(1.0, factors["kv_one"] / factors["kv_graph"])))


def predict(
    shape: Shape, formats: Formats, card: Card, count: int, parallel: str, workload: Workload, chunk: int
) -> Speed:
    """Steady state: every user asks again when answered, prompts are computed in pieces of at most `chunk` tokens between the
    others' steps. No time falls below what the data sheet's rates allow."""
    fitted = roofline.load_coefficients()
    ranks, users = ranks_of(count, parallel), users_per_card(workload.users, count, parallel)
    out = workload.tokens_out
    step = roofline.Step(users, users, workload.tokens_in + out / 2, True, users)
    prompt = roofline.Step(workload.tokens_in, 1, workload.tokens_in, False, 1)
    factor, basis = ranges(shape, formats, card, count, parallel, step, fitted)
    prompt_factor, prompt_basis = ranges(shape, formats, card, count, parallel, prompt, fitted)
    found = steady(shape, formats, card, replace(workload, users=users), chunk, fitted, ranks)
    terms, step_s, prompt_s = found.terms_us, found.step_s, found.prompt_s
    quick = factor * _long_gain(terms, step, fitted)
    least, least_prompt = (roofline.limit_seconds(shape, formats, one, card, ranks) for one in (step, prompt))
    tpot_s, burst_s = found.tpot_s, users * prompt_s
    rate = found.rate * workload.users / users
    fastest = workload.users * out / (out * least + users * least_prompt)

    def time(value: float, floor: float) -> Estimate:
        return Estimate(value, min(value, max(value / quick, floor)), value * factor, basis)

    def first(value: float, floor: float) -> Estimate:
        low = min(value, max(value / prompt_factor, floor))
        return Estimate(value, low, value * prompt_factor, prompt_basis)

    def per_second(value: float, ceiling: float) -> Estimate:
        return Estimate(value, value / factor, max(value, min(value * quick, ceiling)), basis)

    return Speed(
        ttft_s=first(prompt_s, least_prompt),
        ttft_busy_s=first(found.ttft_busy_s, least_prompt),
        ttft_p99_s=first(burst_s, users * least_prompt),
        tpot_s=time(tpot_s, least),
        latency_s=time(burst_s + (out - 1) * tpot_s, least_prompt + (out - 1) * least),
        step_s=time(step_s, least),
        tokens_per_s=per_second(rate, fastest),
        user_tokens_per_s=per_second(rate / workload.users, fastest / workload.users),
        decode_tokens_per_s=per_second(workload.users / step_s, workload.users / least),
        terms_us=terms,
    )
