"""The shapes of the dense Qwen2.5 models: built in by name, or from a config.json. Sizes follow from them; no weights needed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

INTERMEDIATE_UNIT, VOCAB_UNIT = 128, 64  # what a rank of several holds a whole number of


@dataclass(frozen=True)
class Shape:
    """What memory, bytes and operations follow from. Sizes are in elements."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool  # the output head is the embedding
    max_positions: int = 32768
    head_dim: int = 0  # 0: hidden_size / num_heads
    weight_bits: int | None = None  # of the checkpoint, if it is quantised; None: 16
    group_size: int = 128  # of its quantised weights, as packed: 32, 64 or 128

    def __post_init__(self) -> None:
        for field in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "vocab_size"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{self.name}: {field} must be 1 to 2147483647, got {value!r}")
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )

    @property
    def q_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """(name, n, k) of a layer's linears as the engine fuses them, without padding."""
        return (
            ("qkv", self.q_width + 2 * self.kv_width, self.hidden_size),
            ("o", self.hidden_size, self.q_width),
            ("gate_up", 2 * self.intermediate_size, self.hidden_size),
            ("down", self.hidden_size, self.intermediate_size),
        )

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linears."""
        return sum(n * k for _, n, k in self.linears)

    @property
    def parameters(self) -> int:
        """All of them, biases and norms too."""
        biases = self.q_width + 2 * self.kv_width
        layer = self.layer_parameters + biases + 2 * self.hidden_size
        tables = 1 if self.tied else 2
        return tables * self.vocab_size * self.hidden_size + self.num_layers * layer + self.hidden_size


def part_of(shape: Shape, ranks: int) -> Shape:
    """The largest part of a model that one of `ranks` devices holds, as a shape of its own (csrc/model/parallel.h). Heads
    go with their KV head; with more devices than KV heads several share one."""
    if ranks == 1:
        return shape
    group = shape.num_heads // shape.num_kv_heads
    if ranks <= shape.num_kv_heads:
        kv_heads = -(-shape.num_kv_heads // ranks)
        heads = kv_heads * group
    else:
        kv_heads, heads = 1, -(-group // (ranks // shape.num_kv_heads))
    return replace(
        shape,
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=_first_part(shape.intermediate_size, INTERMEDIATE_UNIT, ranks),
        vocab_size=_first_part(shape.vocab_size, VOCAB_UNIT, ranks),
    )


def _first_part(total: int, unit: int, ranks: int) -> int:
    """In whole units, as even as they are; units are halved until there is one for every rank."""
    while unit > 1 and -(-total // unit) < ranks:
        unit //= 2
    units = -(-total // unit)
    return min(total, -(-units // ranks) * unit)


_BUILT_IN = {
    "0.5B": Shape("0.5B", 896, 4864, 24, 14, 2, 151936, True),
    "1.5B": Shape("1.5B", 1536, 8960, 28, 12, 2, 151936, True),
    "3B": Shape("3B", 2048, 11008, 36, 16, 2, 151936, True),
    "7B": Shape("7B", 3584, 18944, 28, 28, 4, 152064, False),
    "14B": Shape("14B", 5120, 13824, 48, 40, 8, 152064, False),
    "32B": Shape("32B", 5120, 27648, 64, 40, 8, 152064, False),
    "72B": Shape("72B", 8192, 29568, 80, 64, 8, 152064, False),
}
NAMES = tuple(_BUILT_IN)


def find_shape(model: str | os.PathLike[str] | Shape) -> Shape:
    """The shape of a model. model: "0.5B" ... "72B" (also written "Qwen2.5-7B" or "Qwen/Qwen2.5-7B-Instruct", no
    download), "demo", a checkpoint directory or its config.json, or a Shape. ValueError says what was wrong."""
    if isinstance(model, Shape):
        return model
    text = os.fspath(model)
    path = Path(text).expanduser()
    if text == "demo":
        from ..utils import DEMO_DIR

        path = DEMO_DIR
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _from_config(path)
    if text != "demo":
        parts = text.rpartition("/")[2].lower().split("-")
        found = [name for name in NAMES if name.lower() in parts]
        if len(found) == 1 and (len(parts) == 1 or parts[0] in ("qwen2.5", "qwen2")):
            return _BUILT_IN[found[0]]
    raise ValueError(f"model: {text!r} is neither one of {', '.join(NAMES)} nor a directory with a config.json")


def _from_config(path: Path) -> Shape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")  # noqa: TRY004  a file's fault

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{path}: {key} must be an integer above 0, got {value!r}")
        return value

    heads = number("num_attention_heads")
    return Shape(
        name=path.parent.resolve().name or str(path),
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        vocab_size=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=number("max_position_embeddings", 32768),
        head_dim=number("head_dim", max(1, number("hidden_size") // heads)),
        **_quantisation(config),
    )


def _quantisation(config: dict[str, Any]) -> dict[str, int]:
    """weight_bits and group_size, where quantization_config says that the weights have 4 or 8 bits."""
    quant = config.get("quantization_config")
    if not isinstance(quant, dict):
        return {}
    groups = quant.get("config_groups")
    if isinstance(groups, dict):  # compressed-tensors: the first group's weights
        first = next((group for group in groups.values() if isinstance(group, dict)), {})
        weights = first.get("weights")
        quant = weights if isinstance(weights, dict) else {}
    bits, size = quant.get("bits", quant.get("num_bits", 4)), quant.get("group_size")
    if bits not in (4, 8):
        return {}
    packed = 128  # also of one group for a whole row
    if isinstance(size, int) and size > 0:
        packed = next((group for group in (128, 64, 32) if size % group == 0), 0)
    return {"weight_bits": bits, "group_size": packed} if packed else {"weight_bits": 16}
