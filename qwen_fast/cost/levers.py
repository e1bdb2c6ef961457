"""What can be turned to make a run cheaper, one option at a time; run.py measures each on an engine with its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .workloads import Item, Workload

BATCHES = (8, 16, 32, 48)
SHARED_SHARE = 0.75


@dataclass(frozen=True)
class Case:
    """One setting of one lever. options: engine options that differ from the report's own. why: not measured, because."""

    lever: str
    setting: str
    workload: Workload
    users: int
    options: Mapping[str, Any] = field(default_factory=dict)
    base: bool = False
    why: str | None = None

    @property
    def key(self) -> str:
        return f"lever:{self.lever}:{self.setting}"


TITLES = {
    "output": "output cap",
    "batch": "batch size (users at once)",
    "max_num_seqs": "max_num_seqs",
    "block_size": "KV block size",
    "kv": "KV precision",
    "weights": "weight precision",
    "head": "head precision",
    "offload": "embedding offload",
    "prefix": "prefix cache",
    "tensor_parallel": "tensor parallel",
    "text": "what is generated",
}
_TEXT = (
    "its effect is on which tokens a trained model chooses; made-up prompts have no useless tokens to save. Measure it on "
    "your own prompts with --prompts"
)


def cases(short: Workload, long_output: Workload, users: int, facts: Mapping[str, Any], quick: bool) -> list[Case]:
    """All levers. short: the workload that most levers run; long_output: the one that the output cap is tried on.

    facts: "options" of the report's engine, its "info", "gpus" (how many this machine has), "same_engine" (True: no
    other engine may be loaded)."""
    info, options = facts["info"], facts["options"]
    found = _output(long_output, users) + _batch(short, facts, quick) + _limits(short, facts, quick)
    sizes = (16, 32, 128) if quick else (16, 32, 64, 128)
    found += _option("block_size", "block_size", sizes, info["block_size"], short, users)
    kv = ("bfloat16", "float32", "fp8", "int8", "int4")
    found += _option("kv", "kv_cache_dtype", kv, info["kv_cache_dtype"], short, users)
    found += _weights(short, users, info, options)
    found += _option("head", "lm_head_dtype", ("model", "int8", "int4"), info["lm_head_dtype"], short, users)
    found += _offload(short, users, info, options) + _prefix(short, users) + _parallel(short, users, facts)
    found.append(Case("text", "repetition_penalty 1.15", short, users, why=_TEXT))
    if facts.get("same_engine"):
        why = "it needs another engine than the one that is loaded; `qwen-fast cost` measures it"
        found = [replace(one, why=one.why or why) if one.options else one for one in found]
    return found


def _option(lever: str, name: str, values: tuple[Any, ...], current: Any, workload: Workload, users: int) -> list[Case]:
    order = sorted(values, key=lambda value: value != current)
    if current not in values:
        order.insert(0, current)
    return [
        Case(lever, str(value), workload, users, {} if value == current else {name: value}, value == current)
        for value in order
    ]


def _output(workload: Workload, users: int) -> list[Case]:
    longest = max(item.output_tokens for item in workload.items)
    cap = 512 if longest > 512 else max(1, longest // 2)
    items = tuple(replace(item, output_tokens=min(item.output_tokens, cap)) for item in workload.items)
    return [
        Case("output", f"{longest} tokens", workload, users, base=True),
        Case("output", f"{cap} tokens", replace(workload, items=items), users),
    ]


def _batch(workload: Workload, facts: Mapping[str, Any], quick: bool) -> list[Case]:
    batches = (1, 4, 8, 16) if quick else (1, *BATCHES)
    limit = facts["info"]["max_num_seqs"]
    return [
        Case(
            "batch",
            str(users),
            workload,
            users,
            base=users == 1,
            why=None if users <= limit else f"max_num_seqs is {limit}",
        )
        for users in batches
    ]


def _limits(workload: Workload, facts: Mapping[str, Any], quick: bool) -> list[Case]:
    limits = (4, 8, 16) if quick else BATCHES
    offered = limits[-1]
    base = facts["info"]["max_num_seqs"]
    first = Case("max_num_seqs", f"{base}, {offered} users", workload, offered, base=True)
    return [first] + [
        Case("max_num_seqs", f"{limit}, {offered} users", workload, offered, {"max_num_seqs": limit})
        for limit in limits[:-1]
    ]


def _weights(workload: Workload, users: int, info: Mapping[str, Any], options: Mapping[str, Any]) -> list[Case]:
    current = info["quantization"]
    found = [Case("weights", current, workload, users, base=True)]
    plain = current in ("none", "w4")
    for value in ("none", "w4"):
        if value == current:
            continue
        why = None if plain else f"the checkpoint's weights are {current}; it has no other precision to load"
        found.append(Case("weights", value, workload, users, {"quantization": value}, why=why))
    return found


def _offload(workload: Workload, users: int, info: Mapping[str, Any], options: Mapping[str, Any]) -> list[Case]:
    if info["backend"] == "cpu":
        return [Case("offload", "embeddings on the host", workload, users, why="the CPU backend has one memory")]
    offloaded = options.get("cpu_offload") == "embeddings"
    # A tied 16-bit head cannot be where its embedding is not: the base has the head that offload brings.
    fixed = {} if info["lm_head_dtype"] != "model" else {"lm_head_dtype": "int8"}
    return [
        Case(
            "offload",
            "embeddings on the GPU",
            workload,
            users,
            {**fixed, "cpu_offload": None} if offloaded else fixed,
            True,
        ),
        Case("offload", "embeddings on the host", workload, users, {**fixed, "cpu_offload": "embeddings"}),
    ]


def _prefix(workload: Workload, users: int) -> list[Case]:
    shared = int(SHARED_SHARE * min(item.prompt_tokens for item in workload.items))
    items = tuple(Item(item.prompt_tokens, item.output_tokens) for item in workload.items)
    same = replace(
        workload, items=items, shared_tokens=shared, title=f"{workload.title}, {shared} prompt tokens shared"
    )
    return [
        Case("prefix", "off", same, users, {"enable_prefix_caching": False}, True),
        Case("prefix", "on", same, users, {"enable_prefix_caching": True}),
    ]


def _parallel(workload: Workload, users: int, facts: Mapping[str, Any]) -> list[Case]:
    gpus, current = facts["gpus"], int(facts["options"].get("tensor_parallel_size") or 1)
    if facts["info"]["backend"] == "cpu":
        return [
            Case(
                "tensor_parallel",
                "2 devices",
                workload,
                users,
                why="it spreads a model over GPUs; this run is on the CPU",
            )
        ]
    found = [Case("tensor_parallel", _devices(current), workload, users, base=True)]
    for count in (1, 2, 4, 8):
        if count == current:
            continue
        why = None if count <= gpus else f"this machine shows {gpus} GPU{'s' if gpus != 1 else ''}"
        found.append(
            Case("tensor_parallel", _devices(count), workload, users, {"tensor_parallel_size": count}, why=why)
        )
    return found


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"
