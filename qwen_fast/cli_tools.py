"""The commands that look and measure: info, bench, doctor."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .utils import DEMO_DIR, format_bytes, format_count


def run_info(args: argparse.Namespace) -> int:
    from . import cli
    from .hub import resolve_model
    from .native import _engine
    from .options import engine_options, merged_overrides
    from .tokenizer import read_json_object

    model = args.model_name or args.model
    options = cli.engine_arguments(args)
    if args.gpu:
        if options.setdefault("device", "cuda").partition(":")[0] != "cuda":
            raise ValueError(f"--gpu asks for a GPU, and --device is {options['device']!r}; give one of them")
    directory = resolve_model(
        model, revision=options.pop("revision", None), download_dir=options.pop("download_dir", None)
    )
    for name in ("tokenizer", "chat_template"):
        options.pop(name, None)
    # A config.json alone says all that the sizes need; with load_format="auto" the engine would want the weights too.
    has_weights = any(Path(directory).glob("*.safetensors"))
    if not has_weights:
        options.setdefault("load_format", "dummy")
    overrides = merged_overrides(options.get("rope_scaling"), options.get("hf_overrides"))
    config = {**read_json_object(Path(directory, "config.json")), **overrides}
    memory = _engine.estimate(directory, **engine_options(**options))
    parameters = count_parameters(config)
    if args.json:
        report = {"model": model, "directory": directory, "has_weights": has_weights, "config": config}
        print(json.dumps({**report, "parameters": parameters, "memory": memory}))
        return 0
    quantised = config.get("quantization_config") or {}
    rows = [
        ("model", f"{model} ({directory})" if model != directory else model),
        ("parameters", f"{format_count(parameters)} ({parameters:,})"),
        (
            "layers",
            f"{config['num_hidden_layers']} of hidden size {config['hidden_size']}, "
            f"intermediate size {config['intermediate_size']}",
        ),
        ("heads", f"{config['num_attention_heads']}, {config.get('num_key_value_heads')} for keys and values"),
        (
            "vocabulary",
            f"{config['vocab_size']} rows, {'tied to' if config.get('tie_word_embeddings') else 'apart from'} the head",
        ),
        ("format", str(quantised.get("quant_method") or config.get("torch_dtype") or config.get("dtype"))),
        (
            "positions",
            f"{config.get('max_position_embeddings')} in the checkpoint, max_model_len {memory['max_model_len']}",
        ),
        ("weights", "safetensors" if has_weights else "none here: sizes follow from config.json"),
        *memory_rows(memory),
    ]
    _print_rows(rows)
    return 0


def memory_rows(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A memory report as rows: what is taken for what, and, where the device has memory of its own, what it leaves."""
    rows = [
        ("embedding", format_bytes(memory["embedding_bytes"])),
        ("layers' weights", format_bytes(memory["layers_bytes"])),
        ("head", format_bytes(memory["head_bytes"]) if memory["head_bytes"] else "shares the embedding"),
        ("workspace", format_bytes(memory["workspace_bytes"])),
        (
            "KV cache",
            f"{format_bytes(memory['kv_cache_bytes'])}: {memory['num_blocks']} blocks of {memory['block_size']} tokens",
        ),
    ]
    if not memory["device_total_bytes"]:
        return [*rows, ("available", format_bytes(memory["available_bytes"]))]
    taken = sum(memory[f"{name}_bytes"] for name in ("embedding", "layers", "head", "workspace", "kv_cache"))
    left = memory["available_bytes"] - taken
    overhead = memory["device_overhead_bytes"]  # what is available is less by it already
    total = format_bytes(memory["device_total_bytes"])
    return [
        *rows,
        ("context, modules", format_bytes(overhead) if overhead else "not known"),
        ("available", f"{format_bytes(memory['available_bytes'])} of the GPU's {total}"),
        ("remains", format_bytes(left) if left >= 0 else f"nothing: {format_bytes(-left)} are missing"),
    ]


def count_parameters(config: dict[str, Any]) -> int:
    """From the shapes in config.json; quantised weights count as the weights that they stand for."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    attention = hidden * (queries + 2 * keys) + queries + 2 * keys + queries * hidden
    layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    tables = 1 if config.get("tie_word_embeddings") else 2
    return tables * config["vocab_size"] * hidden + layers * layer + hidden


def run_bench(args: argparse.Namespace) -> int:
    from . import cli
    from .llm import LLM

    for name in ("input_len", "output_len", "batch", "repeat"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    with LLM(args.model, **cli.engine_arguments(args)) as llm:
        # Token ids that differ between the sequences, so that nothing is shared by the prefix cache.
        limit = len(llm.tokenizer) if llm.tokenizer is not None else llm.vocab_size
        limit = min(limit, llm.vocab_size) - 32 if llm.vocab_size > 64 else llm.vocab_size
        prompts = [[(i * 7919 + j * 104729) % limit for j in range(args.input_len)] for i in range(args.batch)]
        logits_hash = hashlib.blake2b(llm.logits(prompts[0], args.input_len - 1).tobytes(), digest_size=8).hexdigest()
        runs = [_bench_once(llm, prompts, args.output_len) for _ in range(args.repeat)]
        info = llm.info()
    result = {
        "model": args.model,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "batch": args.batch,
        "prefill_tokens_per_s": max(run["prefill"] for run in runs),
        "decode_tokens_per_s": max(run["decode"] for run in runs) if args.output_len > 1 else None,
        "ttft_ms": min(run["ttft"] for run in runs) * 1e3,
        "logits_hash": logits_hash,
        "load_seconds": info["load_seconds"],
        "engine": {
            name: info[name] for name in ("description", "dtype", "quantization", "activation_dtype", "num_threads")
        },
    }
    if args.json:
        print(json.dumps(result))
        return 0
    decode = result["decode_tokens_per_s"]
    _print_rows(
        [
            ("engine", info["description"]),
            ("prefill", f"{result['prefill_tokens_per_s']:,.0f} tokens/s ({args.batch} x {args.input_len} tokens)"),
            (
                "decode",
                f"{decode:,.1f} tokens/s ({args.batch} x {args.output_len} tokens)" if decode else "not measured",
            ),
            ("first token", f"{result['ttft_ms']:.1f} ms"),
            ("logits hash", logits_hash),
        ]
    )
    return 0


def _bench_once(llm: Any, prompts: list[list[int]], output_len: int) -> dict[str, float]:
    """Prefill: prompt tokens until every sequence has its first token. Decode: the tokens after the first, until
    the last one ends, from the moment when all have their first."""
    from .params import SamplingParams

    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, repetition_penalty=1.0, seed=0)
    began = time.monotonic()
    outputs = llm.generate(prompts, params, progress=False)
    times = [output.timings for output in outputs]
    arrival = min(one.arrival_time for one in times)
    first = max(one.first_token_time for one in times)
    last = max(one.last_token_time for one in times)
    produced = sum(len(output.outputs[0].token_ids) for output in outputs)
    if produced != len(prompts) * output_len:
        raise RuntimeError(
            f"expected {len(prompts) * output_len} tokens, got {produced} in {time.monotonic() - began:.1f} s"
        )
    decoded = produced - len(prompts)
    return {
        "prefill": sum(map(len, prompts)) / (first - arrival),
        "decode": decoded / (last - first) if last > first else 0.0,
        "ttft": min(one.ttft_s for one in times),
    }


def run_doctor(args: argparse.Namespace) -> int:
    """Exit code 1 where something needed is missing."""
    report: dict[str, Any] = {
        "qwen_fast": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_available": _available_memory(),
    }
    problems = []
    try:
        from .native import _engine

        report["engine"] = _engine.build_info()
        report["gpus"] = _engine.device_info()
        if _engine.__version__ != __version__:
            problems.append(
                f"the extension is version {_engine.__version__}, the package {__version__}: install it again"
            )
    except ImportError as error:
        report["engine"], report["gpus"] = None, []
        problems.append(str(error))
    report["driver"] = _driver_version()
    report["packages"] = {name: _package_version(name) for name in (*_NEEDED, *_OPTIONAL)}
    problems += [f"{name} is missing: pip install {name}" for name in _NEEDED if report["packages"][name] is None]
    report["demo_model"] = (DEMO_DIR / "config.json").is_file()
    if not report["demo_model"]:
        problems.append("the demo model is missing from the package")
    report["problems"] = problems
    if args.json:
        print(json.dumps(report))
        return 1 if problems else 0
    engine = report["engine"]
    rows = [(name, str(report[name])) for name in ("qwen_fast", "python", "platform", "cpus")]
    rows.append(
        ("memory", f"{format_bytes(report['memory_available'])} available" if report["memory_available"] else "unknown")
    )
    rows.append(("engine", f"version {engine['version']}" if engine else "not built: see below"))
    if engine:
        rows.append(("CPU path", f"{engine['isa']} (of {', '.join(engine['isas'])})"))
        rows += _gpu_rows(engine, report["gpus"], report["driver"])
        rows.append(("compiler", str(engine["compiler"])))
    rows += [
        (name, version or f"not installed ({_OPTIONAL.get(name, 'needed')})")
        for name, version in report["packages"].items()
    ]
    rows.append(("demo model", "present" if report["demo_model"] else "missing"))
    _print_rows(rows)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _gpu_rows(engine: dict[str, Any], gpus: list[dict[str, Any]], driver: str | None) -> list[tuple[str, str]]:
    rows = [("GPU driver", driver or "none found")]
    if not engine["cuda"]:
        reason = "nvcc was not found, or QF_WITHOUT_CUDA=1 was set, at installation"
        return [*rows, ("CUDA", f"not built in: {reason}")]
    rows.append(("CUDA", f"built in, for compute capabilities {_dotted(engine['cuda_archs'])}"))
    for gpu in gpus:
        state = f"{format_bytes(gpu['free_bytes'])} of {format_bytes(gpu['total_bytes'])} free"
        if not gpu["usable"]:
            state = f"cannot be used: {gpu['reason']}"
        rows.append((f"GPU {gpu['index']}", f"{gpu['name']}, {_dotted(str(gpu['compute_capability']))}, {state}"))
    return rows if gpus else [*rows, ("GPU", "none found")]


def _dotted(archs: str) -> str:
    """80,90 -> 8.0, 9.0"""
    return ", ".join(f"{name[:-1]}.{name[-1]}" for name in archs.split(",") if name)


def _driver_version() -> str | None:
    """NVIDIA's, from the kernel module or from nvidia-smi; None where neither answers."""
    try:
        with open("/sys/module/nvidia/version", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        pass
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split("\n") if done.returncode == 0 else [""]
    return lines[0].strip() or None


_NEEDED = ("tokenizers", "jinja2")
_OPTIONAL = {
    "huggingface_hub": "for models by hub id",
    "numpy": "for LLM.logits and bench",
    "rich": "for nicer progress bars",
    "ipykernel": "for notebooks",
    "fastapi": "for the server",
    "uvicorn": "for the server",
    "llguidance": "for grammars",
}


def _package_version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _available_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
