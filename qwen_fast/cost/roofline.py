"""How long a step takes: bytes over effective bandwidth, operations over effective rate, and what every layer and every step
costs besides. The efficiencies come from coefficients.json, which `python -m qwen_fast.cost.fit` makes from measured runs.

A step of t new tokens goes one of three ways through the engine, and each has its own terms:

    one     one sequence, one token, 4-bit layers in groups of 128: one kernel for the whole step
    graph   up to 512 tokens: a kernel for each op
    chunk   more: a piece of a prompt

    time = step + layers x (layer + linears + activations) + KV cache + attention's products + head + logits

A linear takes kernel + token x t microseconds, and reading and products: one after the other where its kernel unpacks
weights beside the products (up to 32 tokens), overlapped (the root of the sum of squares) in the kernel of larger steps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .cards import Card
from .memory import KV_BITS, Formats, kv_token_bytes, packed_bytes
from .shapes import Shape, part_of

COEFFICIENTS = Path(__file__).with_name("coefficients.json")
FAMILIES = (("stream", 8), ("batch", 32), ("many", 512))  # a linear's kernels and the most tokens of each
GRAPH_TOKENS = 512
LONG_CONTEXT = 512  # positions; beyond, the cache of several sequences has terms of its own
PROMPT_TILE = 128  # tokens: a piece of a prompt of more is computed in whole tiles
# A sum over several GPUs: what it takes at its shortest ("one_us": inside the kernel of a whole step), and the share of the
# link's rate that a long one reaches. Of NVLink all come from measured runs (fit_parallel.py), for more GPUs than were measured
# the same is assumed; PCIe was never measured: assumed (2026-11).
PCIE_EXCHANGE = {"us": 25.0, "one_us": 25.0, "share": 0.7}
NVLINK_GBS = 200.0  # a faster link than that is taken for NVLink


@dataclass(frozen=True)
class Step:
    """new_tokens: computed. num_seqs: that they belong to. context: positions that each sequence's last new token sees.
    decode: one new token for each sequence. rows: whose logits are computed."""

    new_tokens: int
    num_seqs: int
    context: float
    decode: bool
    rows: int


def load_coefficients() -> dict[str, Any]:
    """The committed coefficients; read once. ValueError names the file where it cannot be read."""
    return _load(COEFFICIENTS)


@lru_cache(maxsize=4)
def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; make it with `python -m qwen_fast.cost.fit`") from None


def family(tokens: int) -> str:
    return next((name for name, most in FAMILIES if tokens <= most), "many")


def way(shape: Shape, formats: Formats, step: Step, ranks: int = 1) -> str:
    """one, graph or chunk: see above."""
    if step.new_tokens > GRAPH_TOKENS:
        return "chunk"
    one, part = step.decode and step.num_seqs == 1, part_of(shape, ranks)
    plain = formats.weight_bits == 4 and formats.group_size == 128 and shape.hidden_size % 128 == 0
    return "one" if one and plain and part.num_heads <= 8 * part.num_kv_heads else "graph"


# --- terms --------------------------------------------------------------------------------------------------


def linear_us(
    fitted: dict[str, float], kernels: int, size_bytes: float, flops: float, tokens: int, card: Card, overlap: bool
) -> float:
    """`kernels` linears together. fitted: kernel_us, token_us, read and product efficiency."""
    read = size_bytes / (card.bandwidth_gbs * 1e3) / fitted["read_efficiency"]
    product = flops / (card.tflops * 1e6) / fitted["product_efficiency"]
    work = math.hypot(read, product) if overlap else read + product
    return kernels * (fitted["kernel_us"] + fitted["token_us"] * tokens) + work


def layer_linears_us(shape: Shape, bits: int, tokens: int, card: Card, fitted: dict[str, Any]) -> float:
    """The four linears of one layer at so many tokens."""
    size = sum(packed_bytes(n, k, bits) for _, n, k in shape.linears)
    flops = 2.0 * shape.layer_parameters
    return _linears_us(len(shape.linears), size, flops, bits, tokens, card, fitted)


def _linears_us(
    kernels: int, size: float, token_flops: float, bits: int, tokens: int, card: Card, fitted: dict[str, Any]
) -> float:
    """By the kernel for so many tokens, and not less than a kernel for fewer takes at its most. Beyond the measured sizes the
    products run at the rate of the matrix-product probe."""
    longest = 0.0
    for kind, most in FAMILIES:
        c, count = fitted["linears"][str(bits)][kind], min(tokens, most)
        if kind == "many" and tokens > most:
            c, count = {**c, "product_efficiency": fitted["probe_product_efficiency"]}, tokens
        longest = max(longest, linear_us(c, kernels, size, token_flops * count, count, card, kind == "many"))
        if tokens <= most:
            break
    return longest


def head_us(shape: Shape, formats: Formats, rows: int, card: Card, fitted: dict[str, Any]) -> float:
    size = packed_bytes(shape.vocab_size, shape.hidden_size, formats.head_bits)
    flops = 2.0 * shape.vocab_size * shape.hidden_size
    return _linears_us(1, size, flops, formats.head_bits, rows, card, fitted)


def activation_bytes(shape: Shape, tokens: int) -> float:
    """What the kernels of one layer hand each other: residual, normed input, q, k, v, attention, partial sums, silu."""
    wide = 4 * (shape.q_width + 2 * shape.kv_width) * 2 + 2 * shape.q_width * 2 + 2 * shape.intermediate_size * 2
    return tokens * (shape.hidden_size * (16 + 4 + 8) + wide)


def attention_flops(shape: Shape, step: Step) -> float:
    """Queries by keys and weights by values, of a piece of a prompt: a token sees what is before it."""
    seen = step.context - step.new_tokens / 2 if not step.decode else step.context
    return 4.0 * shape.num_layers * shape.q_width * seen * step.new_tokens


def exchanges(shape: Shape) -> int:
    """Sums over all GPUs in a step: two a layer, and the embeddings'."""
    return 2 * shape.num_layers + 1


def sent_bytes(shape: Shape, tokens: int, ranks: int) -> float:
    """By one GPU in a sum, of float32; as much comes in."""
    return 2.0 * (ranks - 1) / ranks * tokens * shape.hidden_size * 4


def exchange_us(shape: Shape, tokens: int, card: Card, fitted: dict[str, Any], ranks: int, kind: str) -> float:
    link = fitted["parallel"]["exchange"] if card.link_gbs >= NVLINK_GBS else PCIE_EXCHANGE
    moved_us = sent_bytes(shape, tokens, ranks) / (card.link_gbs * 1e3 * link["share"])
    return exchanges(shape) * (link["one_us" if kind == "one" else "us"] + moved_us)


def features(
    shape: Shape, formats: Formats, step: Step, card: Card, fitted: dict[str, Any], ranks: int = 1
) -> dict[str, float]:
    """Microseconds of each term with a factor of 1, of the GPU with the largest part. What the fit found multiplies them: see
    terms()."""
    kind, part = way(shape, formats, step, ranks), part_of(shape, ranks)
    bandwidth, layers, t = card.bandwidth_gbs * 1e3, shape.num_layers, step.new_tokens
    found = {"step": 1.0}
    wide = t if step.decode or t <= PROMPT_TILE else -(-t // PROMPT_TILE) * PROMPT_TILE
    found["linears_" + kind] = layers * layer_linears_us(part, formats.weight_bits, wide, card, fitted)
    if kind == "chunk":
        found["layer_tokens_chunk"] = layers * t / 1000
    else:
        found["layers_" + kind] = float(layers)
    if kind != "one":
        found["activations"] = layers * activation_bytes(part, t) / bandwidth
    if step.rows:
        found["head"] = head_us(part, formats, step.rows, card, fitted)
        found["logits"] = step.rows * shape.vocab_size * 4 / bandwidth
    if step.decode:
        one_position = kv_token_bytes(part, formats.kv) * step.num_seqs / bandwidth
        near = step.context if kind == "one" else min(step.context, LONG_CONTEXT)
        found["kv_" + kind] = one_position * near
        if step.context > near:
            found["kv_long"], found["layers_long"] = one_position * (step.context - near), float(layers)
    else:
        if kind == "graph":  # no prompt is part of a captured graph: every kernel is launched
            found["layers_prompt"] = float(layers)
        found["attention"] = attention_flops(part, step) / (card.tflops * 1e6)
    if ranks > 1:
        found["exchange"] = exchange_us(shape, t, card, fitted, ranks, kind)
    return found


def terms(
    shape: Shape, formats: Formats, step: Step, card: Card, fitted: dict[str, Any] | None = None, ranks: int = 1
) -> dict[str, float]:
    """Microseconds by term; their sum is the step's time."""
    fitted = fitted or load_coefficients()
    factors = fitted["factors"]
    found = features(shape, formats, step, card, fitted, ranks)
    return {name: value * factors.get(name, 1.0) for name, value in found.items()}


def step_seconds(
    shape: Shape, formats: Formats, step: Step, card: Card, fitted: dict[str, Any] | None = None, ranks: int = 1
) -> float:
    return sum(terms(shape, formats, step, card, fitted, ranks).values()) / 1e6


def decode_seconds(
    shape: Shape, formats: Formats, batch: int, context: float, card: Card, fitted: dict[str, Any] | None = None,
    ranks: int = 1,
) -> float:  # fmt: skip
    """A step in which `batch` sequences of `context` positions get a token each."""
    return step_seconds(shape, formats, Step(batch, batch, context, True, batch), card, fitted, ranks)


def prefill_seconds(
    shape: Shape, formats: Formats, tokens: int, chunk: int, card: Card, fitted: dict[str, Any] | None = None,
    ranks: int = 1,
) -> float:  # fmt: skip
    """From the first step of a prompt to its first token, in steps of at most `chunk` tokens, alone on the GPU."""
    total, done = 0.0, 0
    while done < tokens:
        size = min(chunk, tokens - done)
        done += size
        last = done == tokens
        total += step_seconds(shape, formats, Step(size, 1, done, False, 1 if last else 0), card, fitted, ranks)
    return total


def limit_seconds(shape: Shape, formats: Formats, step: Step, card: Card, ranks: int = 1) -> float:
    """What no implementation can undercut at the data sheet's rates: every byte read once, every product computed."""
    size = float(shape.num_layers * sum(packed_bytes(n, k, formats.weight_bits) for _, n, k in shape.linears))
    flops = 2.0 * shape.num_layers * shape.layer_parameters * step.new_tokens
    if step.rows:
        size += packed_bytes(shape.vocab_size, shape.hidden_size, formats.head_bits)
        flops += 2.0 * shape.vocab_size * shape.hidden_size * step.rows
    if step.decode:
        size += kv_token_bytes(shape, formats.kv) * step.context * step.num_seqs
    else:
        flops += attention_flops(shape, step)
    return max(size / (card.bandwidth_gbs * 1e9), flops / (card.tflops * 1e12)) / ranks


def is_measured(shape: Shape, formats: Formats, card: Card, fitted: dict[str, Any]) -> list[str]:
    """What of this was never measured as a whole: "card", "shape", "weights", "KV cache". Empty: all was."""
    missing = []
    if card.by_hand or card.name != fitted["card"]:
        missing.append("card")
    if shape.name not in fitted["shapes"]:
        missing.append("shape")
    if formats.weight_bits not in fitted["weight_bits"] or formats.head_bits not in fitted["head_bits"]:
        missing.append("weights")
    if KV_BITS[formats.kv] != 16:
        missing.append("KV cache")
    return missing
