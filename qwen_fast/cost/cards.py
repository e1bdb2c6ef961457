"""GPUs: the makers' data-sheet figures, and cards given by hand. Nothing in this table was measured here.

Rates are for bf16 products with float32 sums, without sparsity, which is what the kernels use. Where a data sheet has
only other rates, `source` says how the figure was derived.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One GPU. memory_bytes: what a driver shows as the total. bandwidth_gbs: GB/s (10**9). tflops: bf16, dense, float32
    sums. link_gbs: to another card, one direction, GB/s. board_watts: not a draw but a limit, so it is not here."""

    name: str
    memory_bytes: int
    bandwidth_gbs: float
    tflops: float
    sm_count: int
    compute_capability: int  # 90 for 9.0
    link_gbs: float
    source: str
    by_hand: bool = False

    def __post_init__(self) -> None:
        limits = {"memory_bytes": 2.0**50, "bandwidth_gbs": 1e6, "tflops": 1e6, "sm_count": 1e5, "link_gbs": 1e6}
        for field, most in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                raise ValueError(f"card {self.name}: {field} must be above 0 and at most {most:g}, got {value!r}")

    @property
    def hopper(self) -> bool:
        return self.compute_capability == 90


_PCIE3, _PCIE4, _PCIE5 = 15.8, 31.5, 63.0  # of 16 lanes, one direction, after encoding
_ECC = 15 / 16  # what is left of GDDR6 where error correction is on, as these server cards come

# name: GiB, share of it that is left, GB/s, TFLOP/s, SMs, compute capability, link GB/s, source
_TABLE: dict[str, tuple[float, float, float, float, int, int, float, str]] = {
    "RTX 3060": (12, 1, 360, 25.5, 28, 86, _PCIE4, "NVIDIA GeForce RTX 3060 specifications; rate from 28 SMs of the GA102 whitepaper's kind at 1.78 GHz"),
    "RTX 3090": (24, 1, 936, 71, 82, 86, _PCIE4, "NVIDIA Ampere GA102 GPU architecture whitepaper"),
    "RTX 4090": (24, 1, 1008, 165.2, 128, 89, _PCIE4, "NVIDIA Ada GPU architecture whitepaper"),
    "RTX 4090D": (24, 1, 1008, 147.1, 114, 89, _PCIE4, "NVIDIA GeForce RTX 4090 D specifications; rate from 114 SMs of the Ada whitepaper's kind at 2.52 GHz"),
    "RTX 5090": (32, 1, 1792, 209.5, 170, 120, _PCIE5, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    "L4": (24, _ECC, 300, 121, 58, 89, _PCIE4, "NVIDIA L4 Tensor Core GPU data sheet (half of its rate with sparsity)"),
    "L40S": (48, _ECC, 864, 362, 142, 89, _PCIE4, "NVIDIA L40S data sheet"),
    "A10G": (24, _ECC, 600, 70, 80, 86, _PCIE4, "AWS EC2 G5 page and NVIDIA A10G figures: 600 GB/s, 70 TFLOP/s, 80 SMs"),
    "A100-40G": (40, 1, 1555, 312, 108, 80, 300, "NVIDIA A100 Tensor Core GPU data sheet, SXM4 40 GB"),
    "A100-80G": (80, 1, 2039, 312, 108, 80, 300, "NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB"),
    "H100": (80, 0.995, 3350, 989.4, 132, 90, 450, "NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB"),
    "H200": (139.8, 1, 4800, 989.4, 132, 90, 450, "NVIDIA H200 Tensor Core GPU data sheet, SXM; memory as its driver shows it"),
}  # fmt: skip

_ALIASES = {
    "3060": "RTX 3060", "rtx306012g": "RTX 3060", "306012g": "RTX 3060", "3090": "RTX 3090", "4090": "RTX 4090",
    "4090d": "RTX 4090D", "5090": "RTX 5090", "a100": "A100-80G", "a10040": "A100-40G", "a10040gb": "A100-40G",
    "a10080": "A100-80G", "a10080gb": "A100-80G", "h10080g": "H100", "h10080gb": "H100", "h100sxm": "H100",
    "h200sxm": "H200", "nvidiah200": "H200",
}  # fmt: skip
CARDS = {
    name: Card(name, int(gib * left * GIB), gbs, tflops, sms, capability, link, source)
    for name, (gib, left, gbs, tflops, sms, capability, link, source) in _TABLE.items()
}
_KEYS = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in CARDS} | _ALIASES
_COUNTED = re.compile(r"\s*(?:(\d{1,4})\s*[x×*]\s*)?(.+?)(?:\s*[x×*]\s*(\d{1,4}))?\s*")
MAX_CARDS = 8


def find_card(text: str | Card) -> tuple[Card, int]:
    """(card, how many) of a text such as "H200", "rtx 4090 d", "4x 4090D" or "A100-40G x2". ValueError lists the names."""
    if isinstance(text, Card):
        return text, 1
    match = _COUNTED.fullmatch(text)
    before, name, after = match.groups() if match else (None, text, None)
    key = re.sub(r"[^a-z0-9]", "", name.lower())
    if key not in _KEYS or (before and after):
        raise ValueError(
            f"card: {text!r} is not one of {', '.join(CARDS)} (with a count: '4x RTX 4090'); "
            "give memory, bandwidth and tflops for another one"
        )
    return CARDS[_KEYS[key]], check_count(int(before or after or 1))


def check_count(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_CARDS:
        raise ValueError(f"number of cards must be 1 to {MAX_CARDS}, got {count!r}")
    return count


def custom_card(memory_bytes: int, bandwidth_gbs: float, tflops: float, name: str = "by hand") -> Card:
    """A card by its figures; taken to have 100 multiprocessors, no Hopper kernels and PCIe 4.0 with 16 lanes."""
    return Card(name, memory_bytes, bandwidth_gbs, tflops, 100, 80, _PCIE4, "given by hand", by_hand=True)


def with_changes(card: Card, memory_bytes: int | None, bandwidth_gbs: float | None, tflops: float | None) -> Card:
    """The card with some figures replaced by hand; the name says so."""
    given = {"memory": memory_bytes, "bandwidth": bandwidth_gbs, "tflops": tflops}
    said = ", ".join(name for name, value in given.items() if value is not None)
    if not said:
        return card
    return replace(
        card,
        name=f"{card.name} (changed)",
        source=f"{card.source}; by hand: {said}",
        by_hand=True,
        memory_bytes=card.memory_bytes if memory_bytes is None else memory_bytes,
        bandwidth_gbs=card.bandwidth_gbs if bandwidth_gbs is None else bandwidth_gbs,
        tflops=card.tflops if tflops is None else tflops,
    )
