"""What a published comparison of GPUs says of Qwen2.5-7B-Instruct, as data to set predictions beside. Claims from other
hardware and another engine: nothing of it was measured here.

2,048 tokens in, 512 out, 1 to 16 users; 16-bit weights and GPTQ in 4 bits; a REST API behind a web page. Its tokens/s are
those of one user except in the row of four cards, which gives more than 1 / TPOT: several users together.
"""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_IN, TOKENS_OUT = 2048, 512
MODEL = "7B"
SOURCE = "study B: a published comparison of GPUs for Qwen2.5-7B-Instruct, 2,048 tokens in, 512 out"


@dataclass(frozen=True)
class Claim:
    """One row of its table. None: not given there. price_per_hour, price_per_million: in yuan."""

    card: str
    count: int
    weight_bits: int
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    memory_gb: float | None
    users: int | None
    price_per_hour: float | None
    price_per_million: float | None

    @property
    def name(self) -> str:
        cards = f"{self.count}x {self.card}" if self.count > 1 else self.card
        return f"{cards}, {self.weight_bits}-bit weights"

    def own_price_per_million(self) -> float | None:
        """What its own price and speed give: price an hour / (tokens/s x 3,600) x 1,000,000."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour / (self.tokens_per_s * 3600) * 1e6


CLAIMS = (
    Claim("RTX 4090D", 1, 16, 890, 48, 20.8, 22.1, 3, 1.2, 4.3),
    Claim("A10G", 1, 16, 1120, 65, 15.4, 23.5, 2, 4.8, 12.5),
    Claim("A100-40G", 1, 16, 760, 42, 23.8, 38.2, 4, 12.0, 20.2),
    Claim("A100-80G", 1, 16, 740, 41, 24.4, 38.2, 5, None, None),
    Claim("RTX 4090D", 4, 16, 620, 32, 125, None, 16, 4.8, 3.8),
    Claim("RTX 4090D", 1, 4, 780, 41, 24.4, 10.3, None, None, None),
)


def claims_for(model: str, card: str, count: int, weight_bits: int) -> list[Claim]:
    """The study's rows for the same model, card, number of cards and precision."""
    if model != MODEL:
        return []
    return [c for c in CLAIMS if (c.card, c.count, c.weight_bits) == (card, count, weight_bits)]
