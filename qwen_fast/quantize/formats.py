"""Codes to the tensors and the quantization_config of the three standard formats.

awq                  AutoAWQ "gemm": 4 bits, asymmetric
gptq                 AutoGPTQ version 1: 4 or 8 bits
compressed-tensors   "pack-quantized": 4 or 8 bits, and an output head of 8 bits beside layers of 4
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .tensors import Stored, from_array

FORMATS = ("awq", "gptq", "compressed-tensors")
_AWQ_SHIFT = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of logical column j in a word


def pack(codes: np.ndarray, bits: int, axis: int, order: Any = None) -> np.ndarray:
    """Whole numbers of so many bits to int32 words along an axis, low bits first, the last word filled with zeros.
    order[j]: where in the word the j-th goes."""
    per_word = 32 // bits
    values = np.moveaxis(codes, axis, 0)
    pad = -values.shape[0] % per_word
    if pad:
        values = np.concatenate([values, np.zeros((pad, *values.shape[1:]), values.dtype)])
    words = np.zeros((values.shape[0] // per_word, *values.shape[1:]), np.uint32)
    for j in range(per_word):
        shift = np.uint32(bits * (order[j] if order else j))
        words |= values[j::per_word].astype(np.uint32) << shift
    return np.ascontiguousarray(np.moveaxis(words, 0, axis)).view(np.int32)


def linear_tensors(
    fmt: str, module: str, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray,
    bits: int, symmetric: bool, act_order: bool, scale_dtype: str,
) -> dict[str, Stored]:  # fmt: skip
    """codes (n, k), zeros (n, num_groups) uint8, scales (n, num_groups) float32, groups (k) whole numbers."""
    if fmt == "awq":
        return {
            f"{module}.qweight": from_array(pack(codes.T, 4, 1, _AWQ_SHIFT), "I32"),
            f"{module}.qzeros": from_array(pack(zeros.T, 4, 1, _AWQ_SHIFT), "I32"),
            f"{module}.scales": from_array(scales.T, "F16"),
        }
    if fmt == "gptq":
        stored = (zeros.T.astype(np.int32) - 1) & (2**bits - 1)  # version 1 adds 1 when it reads
        return {
            f"{module}.qweight": from_array(pack(codes.T, bits, 0), "I32"),
            f"{module}.qzeros": from_array(pack(stored, bits, 1), "I32"),
            f"{module}.scales": from_array(scales.T, "F16"),
            f"{module}.g_idx": from_array(groups, "I32"),
        }
    tensors = {
        f"{module}.weight_packed": from_array(pack(codes, bits, 1), "I32"),
        f"{module}.weight_scale": from_array(scales, scale_dtype),
        f"{module}.weight_shape": from_array(np.array(codes.shape), "I64"),
    }
    if not symmetric:
        tensors[f"{module}.weight_zero_point"] = from_array(pack(zeros, bits, 0), "I32")
    if act_order:
        tensors[f"{module}.weight_g_idx"] = from_array(groups, "I32")
    return tensors


def quantization_config(
    fmt: str, bits: int, group_size: int, symmetric: bool, act_order: bool, head_bits: int, damp: float
) -> dict[str, Any]:
    if fmt == "awq":
        return {
            "quant_method": "awq", "version": "gemm", "bits": bits, "group_size": group_size, "zero_point": True,
            "modules_to_not_convert": None,
        }  # fmt: skip
    if fmt == "gptq":
        return {
            "quant_method": "gptq", "checkpoint_format": "gptq", "bits": bits, "group_size": group_size,
            "sym": symmetric, "desc_act": act_order, "damp_percent": damp, "true_sequential": False,
            "lm_head": False,
        }  # fmt: skip
    groups = {"group_0": _scheme(["Linear"], bits, group_size, symmetric, "group" if act_order else None)}
    if head_bits == 8:
        groups["group_1"] = _scheme(["re:.*lm_head$"], 8, group_size, True, None)
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": [] if head_bits == 8 else ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def _scheme(targets: list[str], bits: int, group_size: int, symmetric: bool, actorder: str | None) -> Mapping[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "channel" if group_size == -1 else "group", "group_size": None if group_size == -1 else group_size,
        "actorder": actorder,
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}
