"""What a quantisation was asked to do, checked, with the defaults that depend on method and format filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .formats import FORMATS
from .gptq import ORDERS
from .grid import GridSpec

METHODS = ("awq", "gptq", "rtn")
GROUP_SIZES = (32, 64, 128, -1)
_DEFAULT_FORMAT = {"awq": "awq", "gptq": "gptq", "rtn": "compressed-tensors"}


@dataclass(frozen=True)
class Options:
    method: str
    format: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: str  # of gptq.ORDERS; "none" for other methods
    head_bits: int
    damp: float
    num_samples: int
    sample_tokens: int
    device: str
    dtype: str

    @property
    def spec(self) -> GridSpec:
        # Readers of version 1 differ in what they make of a stored zero point of -1: there is none in our files.
        return GridSpec(self.bits, self.symmetric, min_zero=1 if self.format == "gptq" else 0)

    @property
    def calibrates(self) -> bool:
        return self.method != "rtn"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_options(
    method: str, format: str | None, bits: int, group_size: int, symmetric: bool | None, act_order: str | None,
    head_bits: int, damp: float, num_samples: int, sample_tokens: int, device: str, dtype: str,
) -> Options:  # fmt: skip
    """ValueError names what does not go together."""
    _one_of("method", method, METHODS)
    format = _DEFAULT_FORMAT[method] if format is None else format
    _one_of("format", format, FORMATS)
    _one_of("bits", bits, (4, 8))
    _one_of("group_size", group_size, GROUP_SIZES)
    _one_of("head_bits", head_bits, (8, 16))
    _one_of("dtype", dtype, ("auto", "float32", "bfloat16"))
    if symmetric is None:
        # The other engines' fast kernels for gptq take nothing else, and transformers reads zero points of
        # compressed-tensors only with dequantize=True (as of transformers 5.23 and compressed-tensors 0.20).
        symmetric = format != "awq"
    if act_order is None:
        act_order = "weight" if method == "gptq" else "none"
    _one_of("act_order", act_order, ORDERS)
    if act_order != "none" and method != "gptq":
        raise ValueError(f"act_order={act_order!r} is for method='gptq'; {method} has no order of columns")
    if format == "awq":
        _refuse(bits != 4, "format='awq' holds 4 bits only; 8 bits go into gptq or compressed-tensors")
        _refuse(symmetric, "format='awq' stores zero points: symmetric grids go into gptq or compressed-tensors")
        _refuse(
            act_order == "group",
            "format='awq' cannot say which group a column is in: act_order='group' goes into gptq or "
            "compressed-tensors; 'weight' fits every format",
        )
    if head_bits == 8 and format != "compressed-tensors":
        why = "knows no quantised head" if format == "awq" else "has one number of bits for all modules"
        raise ValueError(f"format={format!r} {why}: head_bits=8 needs format='compressed-tensors'")
    _refuse(not 0.0 < damp <= 1.0, f"damp must be above 0 and at most 1, got {damp}")
    for name, value in (("num_samples", num_samples), ("sample_tokens", sample_tokens)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        _refuse(not whole or value < 1, f"{name} must be a whole number of at least 1, got {value!r}")
    return Options(
        method,
        format,
        bits,
        group_size,
        symmetric,
        act_order,
        head_bits,
        damp,
        num_samples,
        sample_tokens,
        device,
        dtype,
    )


def _one_of(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


def check_shapes(shapes: Mapping[str, tuple[int, int]], options: Options) -> None:
    """shapes: (outputs, inputs) by module; every one must fit the group size and the format's packing."""
    for module, (n, k) in shapes.items():
        if options.group_size != -1 and k % options.group_size:
            fits = [str(size) for size in GROUP_SIZES if size == -1 or k % size == 0]
            raise ValueError(
                f"{module} has {k} inputs, no multiple of group_size={options.group_size}; {', '.join(fits)} would fit"
            )
        per_word = 32 // options.bits
        if options.format != "compressed-tensors" and (n % per_word or k % per_word):
            raise ValueError(f"{module} has shape ({n}, {k}); format={options.format!r} packs multiples of {per_word}")
