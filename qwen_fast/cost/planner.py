"""qwen_fast.cost.plan: what a model takes and gives on a card that need not be here. Everything is an estimate and says how far off.

Memory by the engine's own arithmetic (memory.py), times by a roofline whose efficiencies were fitted to measured runs of this
engine (roofline.py, fit.py), money by money.py from prices that you give. Power is never guessed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import roofline
from .cards import Card, check_count, find_card
from .memory import DEFAULT_BATCHED_TOKENS, Formats, Memory, Sizes, plan_memory
from .money import Money, Prices, cost_of
from .shapes import Shape, find_shape
from .speed import Speed, Workload, predict, ranks_of, users_per_card
from .study_b import TOKENS_IN, TOKENS_OUT, Claim, claims_for
from .targets import MAX_USERS, Target, parse_target

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_TOKENS = 1 << 20
PARALLEL = ("auto", "replicas", "tensor")


@dataclass(frozen=True)
class Plan:
    """What plan() returns. Displays as tables in a notebook and as text; .plot() draws it; .to_json() is plain data.

    memory: of one card. room_bytes: left on it (below 0: missing). max_context: positions for each user that fit.
    max_users: that fit at this context. speed: None where it does not fit. money: of a million output tokens.
    """

    shape: Shape
    card: Card
    count: int
    parallel: str  # "one", "replicas" or "tensor"
    formats: Formats
    workload: Workload
    sizes: Sizes
    memory: Memory
    fits: bool
    room_bytes: int
    max_context: int
    max_users: int
    speed: Speed | None
    watts: float | None
    power_note: str
    prices: Prices | None
    joules_per_1k_out: float | None
    money: Money | None
    target: Target | None
    unmet: tuple[str, ...]  # parts of the target that are not met
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]

    @property
    def meets_target(self) -> bool:
        return self.fits and not self.unmet

    def __str__(self) -> str:
        from .plan_render import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from .plan_render import as_html

        return as_html(self)

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dumps."""
        from .plan_render import as_json

        return as_json(self)

    def plot(self) -> Any:
        """A matplotlib figure: memory by part, and tokens/s and TPOT against users."""
        from .plan_render import plot

        return plot(self)

    def at(self, users: int) -> Plan:
        """The same plan for another number of users."""
        return _make(self, replace(self.workload, users=users))


# --- the parts ----------------------------------------------------------------------------------------------


def _sizes(workload: Workload, users: int, chunk: int, block_size: int) -> Sizes:
    tokens = -(-workload.context // block_size) * block_size
    return Sizes(workload.context, users, users * tokens, chunk, block_size)


def _memory(plan: Plan, workload: Workload, users: int) -> Memory:
    sizes = _sizes(workload, users, plan.sizes.max_num_batched_tokens, plan.sizes.block_size)
    overhead = roofline.load_coefficients()["overhead_bytes"]
    return plan_memory(plan.shape, plan.formats, sizes, plan.card, overhead, ranks_of(plan.count, plan.parallel))


def _largest(fits: Any, most: int) -> int:
    """The largest n from 1 to most with fits(n), where all below fit too; 0 if none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _notes(plan: Plan) -> tuple[str, ...]:
    said = []
    if plan.parallel == "tensor":
        said.append(_exchange_note(plan))
    if plan.parallel == "replicas":
        said.append("each card runs an engine of its own, and users are spread evenly")
    if plan.workload.context > plan.shape.max_positions:
        said.append(
            f"context {plan.workload.context:,} is beyond the {plan.shape.max_positions:,} positions of the checkpoint's "
            "config: it needs rope_scaling (YaRN)"
        )
    if plan.shape.head_dim not in (64, 128):
        said.append(f"head_dim {plan.shape.head_dim}: the GPU kernels are made for 64 and 128")
    refused = engine_refuses(plan)
    if refused:
        said.append(f"this build of the engine does not run it: {refused}")
    said.append(f"card figures: {plan.card.source}")
    return tuple(said)


def _exchange_note(plan: Plan) -> str:
    """Where the time of the sums over the cards comes from."""
    known = roofline.load_coefficients()["parallel"]
    if plan.card.link_gbs < roofline.NVLINK_GBS:
        link = roofline.PCIE_EXCHANGE
        where = "an assumption; over PCIe nothing was measured"
    else:
        link = known["exchange"]
        counts = " and ".join(map(str, known["ranks"]))
        where = f"measured between {counts} {roofline.load_coefficients()['card']}s"
        if plan.count not in known["ranks"]:
            where += f"; of {plan.count} cards an assumption"
    return (
        f"several cards as one: a sum over them takes {link['us']:.2g} us ({link['one_us']:.2g} inside the kernel of one user's step) and "
        f"long ones {link['share']:.0%} of the link's rate; two a layer: {where}"
    )


def engine_refuses(plan: Plan) -> str:
    """Why the engine of this installation does not take these options, or "" where it does or is not to be asked."""
    try:
        from ..native import _engine
    except ImportError:
        return ""
    from ..utils import DEMO_DIR

    kv = "auto" if plan.formats.kv == "bfloat16" else plan.formats.kv
    asked: list[dict[str, Any]] = []
    if kv != "auto":
        asked.append({"kv_cache_dtype": kv, **({"dtype": "float32"} if kv == "float32" else {})})
    if plan.parallel == "tensor":
        asked.append({"tensor_parallel_size": plan.count})
    device = "cuda" if _engine.build_info()["cuda"] else "cpu"
    for options in asked:
        try:
            _engine.estimate(str(DEMO_DIR), device=device, load_format="dummy", **options)
        except NotImplementedError as error:
            return str(error)
        except (_engine.EngineError, ValueError, MemoryError):
            continue  # it knows the options; no GPU is here, or the demo's own shape does not suit
    return ""


# --- plan ---------------------------------------------------------------------------------------------------


def plan(
    model: str | os.PathLike[str] | Shape,
    card: str | Card = "H200",
    *,
    count: int | None = None,
    parallel: str = "auto",
    weights: int | None = None,
    head: int = 16,
    kv: str = "bfloat16",
    offload_embedding: bool = False,
    tokens_in: int = 512,
    tokens_out: int = 256,
    users: int | None = None,
    context: int | None = None,
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    block_size: int = 32,
    target: str | Target | None = None,
    prices: Prices | None = None,
    watts: float | None = None,
) -> Plan:
    """What the model would take and give on the card. No GPU is needed and nothing is run.

    model: "0.5B" ... "72B", a checkpoint directory, or a Shape. card: such as "H200" or "4x RTX 4090", or a Card.
    count: number of cards, 1 to 8 (default: as the card's text says, else 1). parallel: "replicas" (an engine on each
    card), "tensor" (the model cut over all cards; two H200s were measured), or "auto" (replicas where the model fits one card).
    weights, head: bits of the layers' and the head's weights, 4, 8 or 16 (weights default: the checkpoint's, or 4).
    kv: "bfloat16", "float32", "fp8_e4m3", "int8", "int4", "nf4". tokens_in, tokens_out: of a request. users: at once
    (default: the target's, or 1). context: positions for each user (default: tokens_in + tokens_out).
    target: see targets.parse_target. prices: of all cards together. watts: of all cards together, measured by you; without
    it power and electricity are not given. ValueError names the argument, its value and the limit.
    """
    shape = find_shape(model)
    found, said_count = find_card(card)
    goal = parse_target(target) if isinstance(target, str) else target
    number = _count(count, said_count)
    users = _users(users, goal)
    room = tokens_in + tokens_out if context is None else context
    _check(tokens_in, tokens_out, users, room, max_num_batched_tokens, block_size)
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    if watts is not None and not (math.isfinite(watts) and watts > 0):
        raise ValueError(f"watts must be above 0 and finite, got {watts}")
    bits = shape.weight_bits or 4 if weights is None else weights
    group = shape.group_size if bits == shape.weight_bits else 128
    formats = Formats(bits, head, kv, group, offload_embedding)
    workload = Workload(tokens_in, tokens_out, users, room)
    kind = "one" if number == 1 else "replicas" if parallel == "auto" else parallel
    draft = _draft(
        shape, found, number, kind, formats, workload, max_num_batched_tokens, block_size, watts, prices, goal
    )
    made = _make(draft, workload)
    if parallel == "auto" and number > 1 and not made.fits and _cuts(shape, number):
        made = _make(replace(draft, parallel="tensor"), workload)
    return made


def _count(count: int | None, said: int) -> int:
    """The number of cards, which the card's text may say too."""
    if count is not None and said > 1 and count != said:
        raise ValueError(f"count is {count}, and the card says {said}; give one of them")
    return check_count(said if count is None else count)


def _users(users: int | None, goal: Target | None) -> int:
    wanted = goal.users if goal is not None else None
    if users is not None and wanted not in (None, users):
        raise ValueError(f"users is {users}, and the target says {wanted}; give one of them")
    return users if users is not None else wanted if wanted is not None else 1


def _check(tokens_in: int, tokens_out: int, users: int, room: int, chunk: int, block_size: int) -> None:
    limits = (
        ("tokens_in", tokens_in, MAX_TOKENS),
        ("tokens_out", tokens_out, MAX_TOKENS),
        ("users", users, MAX_USERS),
        ("max_num_batched_tokens", chunk, MAX_TOKENS),
        ("context", room, 2 * MAX_TOKENS),
    )
    for name, value, most in limits:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value!r}")
    if room < tokens_in + tokens_out:
        raise ValueError(f"context {room} is less than tokens_in + tokens_out, {tokens_in + tokens_out}")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size must be 16, 32, 64 or 128, got {block_size!r}")


def _cuts(shape: Shape, count: int) -> bool:
    """Parts need not be even (csrc/model/parallel.h), but each has a query head."""
    return count <= shape.num_heads


def power_note(card: Card) -> str:
    """What is known of the card's draw: runs of ours on it, never a figure for another load or card."""
    runs = [one for one in roofline.load_coefficients()["power"] if one["gpu"].endswith(card.name)]
    if card.by_hand or not runs:
        return "no run of ours on this card has its power; give watts"
    said = [
        f"{one['least']:.0f} to {one['most']:.0f} W under the loads of {one['file']} ({one['model']})" for one in runs
    ]
    return f"of this load; measured on this card: {'; '.join(said)}; give watts"


def _draft(shape: Shape, card: Card, count: int, kind: str, formats: Formats, workload: Workload, chunk: int,
           block_size: int, watts: float | None, prices: Prices | None, goal: Target | None) -> Plan:  # fmt: skip
    """What was asked, with nothing computed yet."""
    if kind == "tensor" and not _cuts(shape, count):
        raise ValueError(
            f"parallel: {shape.name} has {shape.num_heads} query heads, fewer than {count} cards: each needs one"
        )
    users = users_per_card(workload.users, count, kind)
    note = "given by you" if watts is not None else power_note(card)
    nothing = Memory(0, 0, 0, 0, 0, 0.0, 0)
    return Plan(shape, card, count, kind, formats, workload, _sizes(workload, users, chunk, block_size), nothing, False, 0,
                0, 0, None, watts, note, prices, None, None, goal, (), (), ())  # fmt: skip


def _make(draft: Plan, workload: Workload) -> Plan:
    """Everything that follows from what was asked."""
    total = draft.card.memory_bytes
    users = users_per_card(workload.users, draft.count, draft.parallel)
    memory = _memory(draft, workload, users)
    fits = memory.total_bytes <= total
    cards = 1 if draft.parallel == "tensor" else draft.count
    most_users = _largest(lambda n: _memory(draft, workload, n).total_bytes <= total, MAX_USERS) * cards
    longest = _largest(
        lambda n: _memory(draft, replace(workload, context=n), users).total_bytes <= total, 2 * MAX_TOKENS
    )
    deployment = (draft.shape, draft.formats, draft.card, draft.count, draft.parallel)
    speed = predict(*deployment, workload, draft.sizes.max_num_batched_tokens) if fits else None
    energy = draft.watts / speed.tokens_per_s.value * 1000 if draft.watts is not None and speed is not None else None
    money = _money(workload, speed, energy, draft.prices) if draft.prices is not None and speed is not None else None
    same = (workload.tokens_in, workload.tokens_out) == (TOKENS_IN, TOKENS_OUT)
    claims = claims_for(draft.shape.name, draft.card.name, draft.count, draft.formats.weight_bits) if same else []
    chunk, block_size = draft.sizes.max_num_batched_tokens, draft.sizes.block_size
    made = replace(draft, workload=workload, sizes=_sizes(workload, users, chunk, block_size), memory=memory, fits=fits,
                   room_bytes=total - memory.total_bytes, max_context=longest, max_users=min(most_users, MAX_USERS),
                   speed=speed, joules_per_1k_out=energy, money=money, claims=tuple(claims))  # fmt: skip
    return replace(made, unmet=_unmet(made), notes=_notes(made))


def _money(workload: Workload, speed: Speed, joules_per_1k: float | None, prices: Prices) -> Money:
    """Of a million output tokens and the prompts that they need."""
    joules = None if joules_per_1k is None else joules_per_1k * 1000
    tokens_in = round(1e6 * workload.tokens_in / workload.tokens_out)
    return cost_of(joules, 1e6 / speed.tokens_per_s.value, tokens_in, 1_000_000, prices)


def _unmet(made: Plan) -> tuple[str, ...]:
    if made.target is None:
        return ()
    if made.speed is None:
        return ("it does not fit the memory",)
    missed = []
    for bound in made.target.bounds:
        value = getattr(made.speed, bound.field).value
        if not bound.met(value):
            missed.append(f"{bound.text}: predicted {value:.4g} {'s' if bound.most else 'tokens/s'}")
    return tuple(missed)


def curve(made: Plan, users: Iterable[int]) -> list[Plan]:
    """The plan at other numbers of users, those that fit."""
    found = [_make(made, replace(made.workload, users=n)) for n in users]
    return [one for one in found if one.fits]
