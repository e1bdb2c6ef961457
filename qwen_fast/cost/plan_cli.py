"""qwen-fast plan: its arguments, and what it does. Imports the planner when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_BITS = {"4": 4, "8": 8, "16": 16, "w4": 4, "w8": 8, "int4": 4, "int8": 8, "bf16": 16, "fp16": 16, "model": 16}
PRICES = (
    ("electricity-per-kwh", "tariff"),
    ("pue", "energy of the building per energy of the machine, at least 1"),
    ("hardware-price", "of all cards together"),
    ("hardware-life-years", "written off over so many years (default 3)"),
    ("utilisation", "share of that life in which they compute (default 0.5)"),
    ("rent-per-hour", "of all cards together"),
    ("api-price-in-per-million", "an API's price of a million prompt tokens"),
    ("api-price-out-per-million", "the same of output tokens"),
)


def bits(text: str) -> int:
    """4, 8 or 16 from "4", "w4", "int8", "bf16"."""
    if text.lower() not in _BITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_BITS)}")
    return _BITS[text.lower()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="0.5B ... 72B, or a checkpoint directory (default 7B)"
    )
    parser.add_argument("--card", help="such as H200, '4x RTX 4090', A100-40G (default H200); `--card list` names them")
    parser.add_argument("--count", type=int, metavar="N", help="number of cards, 1 to 8")
    parser.add_argument("--parallel", default="auto", choices=["auto", "replicas", "tensor"],
                        help="replicas: an engine on each card; tensor: the model cut over all (two H200s were measured)")  # fmt: skip
    hand = parser.add_argument_group("a card by hand, or changes to --card")
    hand.add_argument("--card-memory", metavar="SIZE", help="such as 24GiB")
    hand.add_argument("--bandwidth", type=float, metavar="GB/S", help="of its memory")
    hand.add_argument("--tflops", type=float, metavar="X", help="bf16 TFLOP/s with float32 sums, without sparsity")
    asked = parser.add_argument_group("what is asked")
    asked.add_argument("--weights", type=bits, metavar="BITS", help="4, 8 or 16 (default: the checkpoint's, or 4)")
    asked.add_argument(
        "--head", type=bits, default=16, metavar="BITS", help="of the output head: 4, 8 or 16 (default 16)"
    )
    asked.add_argument("--kv", default="bfloat16", help="KV cache: bfloat16, float32, fp8_e4m3, int8, int4, nf4")
    asked.add_argument("--offload-embedding", action="store_true", help="the embedding stays in the host's memory")
    asked.add_argument("--in", dest="tokens_in", type=int, default=512, metavar="N", help="prompt tokens (default 512)")
    asked.add_argument(
        "--out", dest="tokens_out", type=int, default=256, metavar="N", help="output tokens (default 256)"
    )
    asked.add_argument("--users", type=int, metavar="N", help="at once (default 1, or the target's)")
    asked.add_argument(
        "--context", type=int, metavar="N", help="positions for each user (default: in and out together)"
    )
    asked.add_argument(
        "--max-num-batched-tokens", type=int, default=2048, metavar="N", help="tokens in a step (default 2048)"
    )
    asked.add_argument("--target", help="such as '16 users, P99<3s'; with --cheapest the goal of the search")
    asked.add_argument("--cheapest", action="store_true", help="try every card and 1, 2, 4, 8 of them against --target")
    asked.add_argument("--price", action="append", default=[], metavar="CARD=KIND:X",
                       help="for --cheapest: A10G=rent:4.8 (an hour) or 'RTX 4090=buy:16000', of one card; may be repeated")  # fmt: skip
    asked.add_argument("--study-b-prices", action="store_true", help="for --cheapest: the rents that study B assumed")
    asked.add_argument(
        "--study-b", action="store_true", help="study B's whole table beside predictions, and nothing else"
    )
    asked.add_argument("--watts", type=float, metavar="W", help="of all cards, measured by you; power is never guessed")
    money = parser.add_argument_group("prices (each optional; without one its amount is left out)")
    money.add_argument("--currency", default="¥", help="symbol (default ¥)")
    for name, text in PRICES:
        money.add_argument(f"--{name}", type=float, metavar="X", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the tables as HTML too")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 1 where it does not fit or misses the target."""
    if args.card is not None and args.card.strip().lower() == "list":
        return _list_cards(args.json)
    if args.study_b:
        return _print(args, study_b_report(args))
    if args.cheapest:
        found = _cheapest(args)
        return _print(args, found) or (0 if found.options else 1)
    if args.price or args.study_b_prices:
        raise ValueError(
            "--price and --study-b-prices are for --cheapest; give --rent-per-hour or --hardware-price here"
        )
    from .planner import plan

    card, count = _card(args)
    options = {"count": count, "prices": _prices(args), "watts": args.watts, "target": args.target}
    made = plan(args.model or "7B", card, **options, **_common(args))
    return _print(args, made) or (0 if made.fits and made.meets_target else 1)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    names = ("parallel", "weights", "head", "kv", "offload_embedding", "tokens_in", "tokens_out", "users", "context",
             "max_num_batched_tokens")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def _card(args: argparse.Namespace) -> tuple[Any, int | None]:
    from ..utils import parse_bytes
    from .cards import custom_card, find_card, with_changes

    memory = None if args.card_memory is None else parse_bytes(args.card_memory, "--card-memory")
    given = (memory, args.bandwidth, args.tflops)
    if args.card is None and any(value is not None for value in given):
        if memory is None or args.bandwidth is None or args.tflops is None:
            raise ValueError(
                "a card by hand needs all of --card-memory, --bandwidth and --tflops (or --card to change one)"
            )
        return custom_card(memory, args.bandwidth, args.tflops), args.count
    if all(value is None for value in given):
        return args.card or "H200", args.count
    card, count = find_card(args.card)
    if args.count is not None and count > 1 and args.count != count:
        raise ValueError(f"--count is {args.count}, and --card says {count}; give one of them")
    return with_changes(card, *given), args.count or count


def _prices(args: argparse.Namespace) -> Any:
    """Prices, or None where none was given."""
    from .money import Prices

    given = {name: getattr(args, name) for name in (name.replace("-", "_") for name, _ in PRICES)}
    if all(value is None for value in given.values()):
        return None
    return Prices(currency=args.currency, **given)


def _cheapest(args: argparse.Namespace) -> Any:
    from .choice import choose, parse_card_price, study_b_prices
    from .money import Prices

    if args.target is None:
        raise ValueError("--cheapest needs --target, such as '16 users, P99<3s'")
    for name in ("count", "card_memory", "bandwidth", "tflops", "watts", "rent_per_hour", "hardware_price"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')} is for one card; --cheapest takes --price CARD=rent:X or CARD=buy:X"
            )
    prices = dict(study_b_prices()) if args.study_b_prices else {}
    prices |= dict(parse_card_price(text) for text in args.price)
    cards = None if args.card is None else [args.card]
    common = _prices(args) or Prices(currency=args.currency)
    return choose(args.model or "7B", args.target, cards=cards, card_prices=prices, prices=common, **_common(args))


class Report:
    """Tables that are no single plan."""

    def __init__(self, tables: list[Any], data: Any) -> None:
        self.tables, self.data = tables, data

    def __str__(self) -> str:
        from .plan_render import plain

        return plain(self.tables)

    def _repr_html_(self) -> str:
        from .plan_render import as_html_tables

        return as_html_tables(self.tables)

    def to_json(self) -> Any:
        return self.data


def study_b_report(args: argparse.Namespace | None = None) -> Report:
    """Every row of study B beside what is predicted for the same card, count and precision."""
    from .plan_render import claim_rows
    from .planner import plan
    from .study_b import CLAIMS, MODEL, SOURCE, TOKENS_IN, TOKENS_OUT

    if args is not None and args.model not in (None, MODEL):
        raise ValueError(f"--study-b is about the {MODEL} model, got {args.model!r}")
    rows, data = [], []
    for claim in CLAIMS:
        parallel = "tensor" if claim.count > 1 else "auto"
        made = plan(MODEL, claim.card, count=claim.count, parallel=parallel, weights=claim.weight_bits,
                    tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT)  # fmt: skip
        rows += claim_rows(made, claim)
        data.append(made.to_json())
    return Report([(SOURCE, ("", "it says", "predicted here", "range"), rows)], data)


def _list_cards(as_json: bool) -> int:
    from dataclasses import asdict

    from ..utils import format_bytes
    from .cards import CARDS

    if as_json:
        print(json.dumps({name: asdict(card) for name, card in CARDS.items()}))
        return 0
    for card in CARDS.values():
        print(f"{card.name:10} {format_bytes(card.memory_bytes):>10} {card.bandwidth_gbs:6,.0f} GB/s {card.tflops:6.4g} TFLOP/s  {card.source}")  # fmt: skip
    return 0


def _print(args: argparse.Namespace, found: Any) -> int:
    if args.html is not None:
        page = f'<!doctype html><meta charset="utf-8"><title>qwen-fast plan</title>{found._repr_html_()}\n'
        args.html.write_text(page, encoding="utf-8")
    if args.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    elif not (sys.stdout.isatty() and _rich(found)):
        print(found)
    return 0


def _rich(found: Any) -> bool:
    """Prints tables by rich on a terminal; False where rich is not installed."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    from .plan_render import tables_of

    console = Console()
    for title, columns, rows in tables_of(found):
        width = max([len(columns), *map(len, rows)])
        table = Table(title=escape(title), title_justify="left", show_header=any(columns))
        for i in range(width):
            table.add_column(columns[i] if i < len(columns) else "")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    return True
