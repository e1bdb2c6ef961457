"""What the tests of this folder share."""

from __future__ import annotations

from qwen_fast import LLM
from qwen_fast.cost.money import Prices

PRICES = Prices("€", 0.3, 1.2, 9000, 4, 0.5, 2.5, 1, 4)


def load(options):
    return LLM("demo", progress=False, max_model_len=192, **options)
