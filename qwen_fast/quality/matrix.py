"""Axes of number formats, and the cells that they span."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .scorer import model_name

# Short names of axes, and of values on them; any engine option is an axis under its own name too.
AXES = {"weights": "quantization", "head": "lm_head_dtype", "kv": "kv_cache_dtype", "activations": "activation_dtype"}
_VALUES = {
    "lm_head_dtype": {"16": "model", "8": "int8", "4": "int4"},
    "kv_cache_dtype": {"16": "bfloat16"},
    "activation_dtype": {"8": "int8", "16": "bfloat16", "32": "float32"},
}
_WEIGHTS = ("auto", "none", "w4", "awq", "gptq", "compressed-tensors")


class Spot(NamedTuple):
    """A cell to measure. axes: as written. model: another checkpoint than the one that was asked for, or None."""

    label: str
    axes: dict[str, str]
    model: str | None
    options: dict[str, Any]


def parse_axes(texts: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, list[str]]:
    """Axes from texts such as "weights=auto,w4 kv=auto,int8". kinds: the engine's options by name."""
    axes: dict[str, list[str]] = {}
    for part in " ".join(texts).split():
        name, sign, values = part.partition("=")
        listed = [value for value in values.split(",") if value]
        if not sign or not listed:
            raise ValueError(f"an axis is NAME=VALUE,VALUE, such as kv=auto,int8; got {part!r}")
        if AXES.get(name, name.replace("-", "_")) not in kinds:
            raise ValueError(f"unknown axis {name!r}; known: {', '.join(AXES)}, and the engine's options by name")
        if name in axes:
            raise ValueError(f"the axis {name!r} is given twice")
        if len(set(listed)) < len(listed):
            raise ValueError(f"the axis {name!r} has a value twice: {values!r}")
        axes[name] = listed
    if not axes:
        raise ValueError("no axis is given; an axis is NAME=VALUE,VALUE, such as kv=auto,int8")
    fields = [AXES.get(name, name.replace("-", "_")) for name in axes]
    if len(set(fields)) < len(fields):
        raise ValueError(f"two axes are one option: {', '.join(axes)}")
    return axes


def spots(axes: Mapping[str, Sequence[str]], chosen: Sequence[str], kinds: Mapping[str, Any]) -> list[Spot]:
    """Every combination, the last axis fastest; chosen: only those that one of these texts, such as "weights=w4 kv=int4",
    agrees with."""
    wanted = [parse_axes([text], kinds) for text in chosen]
    for one in wanted:
        for name, some in one.items():
            unknown = [value for value in some if value not in axes.get(name, ())]
            if unknown:
                raise ValueError(f"no cell has {name}={unknown[0]}; the matrix has {_said(axes)}")
    found = []
    names = _checkpoint_names(value for values in axes.values() for value in values)
    for values in itertools.product(*axes.values()):
        at = dict(zip(axes, values))
        if not wanted or any(all(at[name] in some for name, some in one.items()) for one in wanted):
            found.append(_spot(at, kinds, names))
    return found


def _checkpoint_names(values: Iterable[str]) -> dict[str, str]:
    """What reports call checkpoints: they show no folders, so those with one name are numbered."""
    names: dict[str, str] = {}
    for value in values:
        shown = name = model_name(value)
        number = 1
        while value not in names and shown in names.values():
            number += 1
            shown = f"{name} ({number})"
        names.setdefault(value, shown)
    return names


def _said(axes: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"{name}={','.join(values)}" for name, values in axes.items())


def _spot(at: dict[str, str], kinds: Mapping[str, Any], names: Mapping[str, str]) -> Spot:
    options: dict[str, Any] = {}
    model = None
    shown = dict(at)
    for name, value in at.items():
        field = AXES.get(name, name.replace("-", "_"))
        if field == "quantization" and value not in _WEIGHTS:
            if not os.path.isdir(os.path.expanduser(value)) and "/" not in value and value != "demo":
                raise ValueError(f"{name}={value}: neither one of {', '.join(_WEIGHTS)} nor a checkpoint")
            model, shown[name] = value, names[value]
            continue
        value = _VALUES.get(field, {}).get(value, value)
        try:
            options[field] = kinds[field](value)
        except ValueError:
            raise ValueError(f"{name}={value}: not a value of {kinds[field].__name__}") from None
    return Spot(", ".join(f"{name} {value}" for name, value in shown.items()), shown, model, options)
