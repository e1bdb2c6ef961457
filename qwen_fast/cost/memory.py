"""The engine's memory plan in Python, for GPUs that are not here: the same parts, padding and limits as the CUDA backend's
plan (csrc/backend/cuda/memory.c and weights_plan.c), which `qwen-fast info --gpu` prints where there is such a GPU.

Held to the engine by a test: every committed measurement to the byte or nearly so, and a table of the engine's own plans
for other shapes and cards within 3 % or 96 MiB, whichever is more.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cards import Card
from .shapes import Shape, part_of

MAX_LOGIT_ROWS = 256
MAX_TOP_LOGPROBS = 64
SPARE_UNITS = 1024  # attention's workspace: besides two units for each sequence
UNIT_POSITIONS = 64  # positions of the shortest split of a decode row
WORK_ITEMS, SPLIT_ITEMS = 264, 512
ITEM_BYTES, SAMPLE_ROW_BYTES, LOGPROB_BYTES, DECODE_LAYER_BYTES = 40, 88, 12, 264
MAX_ROW_BIASES = 128
CUT_TOKENS_HOPPER, CUT_TOKENS = 2048, 1024  # cuts x tokens of the largest step whose linears are cut in k
SAMPLE_GROUP, SAMPLE_BLOCK, SAMPLE_BINS = 512, 128, 2048
# Of each of several GPUs: what the others write into it, three buffers by turns and the decode kernel's sums.
EXCHANGE_BYTES = 3 * (16 << 20) + (2 << 20)
DEFAULT_BATCHED_TOKENS = 2048
KV_BITS = {"bfloat16": 16, "float32": 32, "fp8_e4m3": 8, "int8": 8, "int4": 4, "nf4": 4}
KV_GROUP = 32  # elements to a scale of 16 bits in a 4-bit cache; an 8-bit one has a scale for each row of head_dim


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Formats:
    """weight_bits, head_bits: 4, 8 or 16. kv: a key of KV_BITS. group_size: 32, 64, 128, of 4- and 8-bit weights."""

    weight_bits: int = 4
    head_bits: int = 16
    kv: str = "bfloat16"
    group_size: int = 128
    offload_embedding: bool = False

    def __post_init__(self) -> None:
        for field in ("weight_bits", "head_bits"):
            if getattr(self, field) not in (4, 8, 16):
                raise ValueError(f"{field} must be 4, 8 or 16, got {getattr(self, field)!r}")
        if self.kv not in KV_BITS:
            raise ValueError(f"kv must be one of {', '.join(KV_BITS)}, got {self.kv!r}")
        if self.group_size not in (32, 64, 128):
            raise ValueError(f"group_size must be 32, 64 or 128, got {self.group_size!r}")


@dataclass(frozen=True)
class Sizes:
    """The engine's options that its memory depends on, by the engine's names. kv_cache_tokens: of all sequences."""

    max_model_len: int
    max_num_seqs: int
    kv_cache_tokens: int
    max_num_batched_tokens: int = DEFAULT_BATCHED_TOKENS
    block_size: int = 32


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, as the engine's memory report names them. overhead: the driver's context and modules."""

    embedding_bytes: int
    layers_bytes: int
    head_bytes: int
    workspace_bytes: int
    kv_cache_bytes: int
    kv_token_bytes: float
    overhead_bytes: int

    @property
    def planned_bytes(self) -> int:
        """What the engine allocates."""
        return self.fixed_bytes + self.kv_cache_bytes

    @property
    def fixed_bytes(self) -> int:
        """Without the cache."""
        return self.embedding_bytes + self.layers_bytes + self.head_bytes + self.workspace_bytes

    @property
    def total_bytes(self) -> int:
        return self.planned_bytes + self.overhead_bytes


# --- weights ------------------------------------------------------------------------------------------------


def packed_bytes(n: int, k: int, bits: int, group_size: int = 128) -> int:
    """A linear's weights and scales as the GPU keeps them; n and k as padded."""
    scales = _up(n * k // group_size * 4, 256) if bits <= 8 else 0
    return _up(n * k * bits // 8, 256) + scales


def layer_bytes(shape: Shape, bits: int, group_size: int = 128) -> int:
    """One layer: norms, biases, linears."""
    total = 2 * _up(shape.hidden_size * 4, 256)
    for name, n, k in shape.linears:
        n, k = _up(n, 16), _up(k, 128)
        total += packed_bytes(n, k, bits, group_size) + (_up(n * 4, 256) if name == "qkv" else 0)
    return total


def head_and_embedding_bytes(shape: Shape, formats: Formats) -> tuple[int, int]:
    n, k = _up(shape.vocab_size, 16), _up(shape.hidden_size, 128)
    head = _up(shape.hidden_size * 4, 256) + packed_bytes(n, k, formats.head_bits)
    shared = shape.tied and formats.head_bits == 16
    embedding = 0 if formats.offload_embedding or shared else _up(shape.vocab_size * shape.hidden_size * 2, 256)
    return head, embedding


def kv_token_bytes(shape: Shape, kv: str = "bfloat16") -> float:
    """A token's keys and values over all layers."""
    bits: float = KV_BITS[kv]
    if bits < 16:
        bits += 16 / (KV_GROUP if bits == 4 else shape.head_dim)
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * bits / 8


# --- workspace ----------------------------------------------------------------------------------------------


def _partial_words(shape: Shape, tokens: int, card: Card) -> tuple[int, int]:
    """float32 words for the partial sums of qkv, and of o or down. Small steps cut k in two or more, large ones do not:
    so the room is that of the largest step, or of the largest one that is cut."""
    rows = [_up(n, 16) for _, n, _ in shape.linears]
    cut_tokens = CUT_TOKENS_HOPPER if card.hopper else CUT_TOKENS
    room = max(tokens, min(2 * tokens, cut_tokens))
    return rows[0] * room, rows[1] * room


def _activation_bytes(shape: Shape, sizes: Sizes, card: Card) -> int:
    tokens = sizes.max_num_batched_tokens
    padded = _up(tokens, 8)
    rows = logit_rows(sizes)
    hidden_k, q_k = _up(shape.hidden_size, 128), _up(shape.q_width, 128)
    inter_k = _up(shape.intermediate_size, 128)
    qkv, delta = _partial_words(shape, tokens, card)
    parts = (
        tokens * shape.hidden_size * 4,  # residual
        tokens * shape.head_dim * 4,  # rotations
        qkv * 4,
        tokens * shape.q_width * 2,
        delta * 4,
        hidden_k * padded * 2,
        q_k * padded * 2,
        inter_k * padded * 2,
        hidden_k * _up(rows, 8) * 2,
    )
    return sum(_up(part, 256) for part in parts)


def logit_rows(sizes: Sizes) -> int:
    return min(max(sizes.max_num_seqs, 16), MAX_LOGIT_ROWS)


def _meta_bytes(shape: Shape, sizes: Sizes, vocab_size: int) -> int:
    """A step's description: per token, per sequence, attention's items, block tables, masks."""
    seqs = _up(sizes.max_num_seqs, 16)
    tokens = max(sizes.max_num_batched_tokens, seqs)
    group = max(1, shape.num_heads // shape.num_kv_heads)
    tiles = min(tokens, tokens // max(1, 64 // group) + seqs)
    items = min(
        tiles + 2 * seqs + WORK_ITEMS // shape.num_kv_heads + 1 + SPLIT_ITEMS,
        tiles * -(-sizes.max_model_len // UNIT_POSITIONS),
    )
    words = seqs * (-(-sizes.max_model_len // sizes.block_size) + -(-vocab_size // 32) + 2 * MAX_ROW_BIASES + 1)
    return _up(32 + tokens * (16 + SAMPLE_ROW_BYTES) + seqs * 12 + 64 + items * ITEM_BYTES + words * 4, 256)


def _sample_bytes(vocab_size: int, rows: int) -> int:
    groups = -(-vocab_size // SAMPLE_GROUP)
    blocks = groups * SAMPLE_GROUP // SAMPLE_BLOCK
    return rows * (groups * (SAMPLE_GROUP * 4 + 8 + 8 + 16) + SAMPLE_BINS * 12 + blocks * 8)


def _attention_bytes(shape: Shape, sizes: Sizes) -> int:
    heads = shape.num_heads
    words = _up(2 * heads, 4) + heads * shape.head_dim + _up(shape.num_kv_heads, 4)
    splits = -(-sizes.max_model_len // UNIT_POSITIONS)
    units = min(SPARE_UNITS + 2 * sizes.max_num_seqs, sizes.max_num_batched_tokens * splits)
    return units * words * 4


def _decode_bytes(shape: Shape, card: Card) -> int:
    """The one-sequence kernel's: partial sums of attention, and what its CTAs exchange (4 pieces of each at most)."""
    splits = min(32, max(1, card.sm_count // shape.num_kv_heads))
    partials = shape.num_heads * splits * (shape.head_dim + 2) * 16
    exchange = 2 * shape.q_width + 4 * shape.kv_width + shape.q_width + 6 * shape.hidden_size + shape.intermediate_size
    return 256 + partials + exchange * 8


def workspace_bytes(shape: Shape, formats: Formats, sizes: Sizes, card: Card, ranks: int = 1) -> int:
    """Everything of a step that is neither weight nor cache, of the first of `ranks` GPUs: the one that samples."""
    part, vocab_size = part_of(shape, ranks), shape.vocab_size
    rows, seqs = logit_rows(sizes), sizes.max_num_seqs
    total = _activation_bytes(part, sizes, card)
    total += rows * _up(part.vocab_size, 16) * 4 + vocab_size * 8 + sizes.max_num_batched_tokens * 4
    total += (sizes.max_num_batched_tokens + seqs) * (1 + MAX_TOP_LOGPROBS) * LOGPROB_BYTES
    total += 3 * _meta_bytes(part, sizes, vocab_size) + shape.num_layers * DECODE_LAYER_BYTES
    total += seqs * (4 + vocab_size * 2) + _attention_bytes(part, sizes) + _sample_bytes(vocab_size, rows)
    if ranks > 1:  # all ranks' logits, and what the others write here
        total += rows * _up(vocab_size, 16) * 4 + EXCHANGE_BYTES
    if formats.weight_bits == 4 and formats.group_size == 128:
        total += _decode_bytes(part, card)
    return total


def plan_memory(
    shape: Shape, formats: Formats, sizes: Sizes, card: Card, overhead_bytes: int, ranks: int = 1
) -> Memory:
    """What the first of `ranks` GPUs holds, which has the largest part of layers, head, embedding and cache."""
    part = part_of(shape, ranks)
    head, embedding = head_and_embedding_bytes(part, formats)
    per_token = kv_token_bytes(part, formats.kv)
    blocks = -(-sizes.kv_cache_tokens // sizes.block_size)
    return Memory(
        embedding_bytes=embedding,
        layers_bytes=shape.num_layers * layer_bytes(part, formats.weight_bits, formats.group_size),
        head_bytes=head,
        workspace_bytes=workspace_bytes(shape, formats, sizes, card, ranks),
        kv_cache_bytes=int(blocks * sizes.block_size * per_token),
        kv_token_bytes=per_token,
        overhead_bytes=overhead_bytes,
    )
