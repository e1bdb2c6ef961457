"""quantize(): the whole run, layer by layer."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..hub import resolve_model
from ..loading import load_tokenizer
from ..native import _engine
from ..progress import Progress
from .arrays import Arrays, arrays_for
from .calibration import load_blocks
from .formats import quantization_config
from .grid import GridSpec
from .layer import collect, quantize_head, quantize_layer, run_layer
from .memory import PeakMemory
from .model import INPUTS, Layer, Model
from .options import Options, check_shapes, make_options
from .tensors import Stored, read_file, write_file, write_parts
from .work import Work, array_hash, check_out

LayerDone = Callable[[int, int, dict[str, Any]], object]  # layers done, layers, notes on the last one
CALL_TOKENS = 4096  # in one call of a layer: bounds what its activations take
SHARD_BYTES = 5 * 10**9


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "awq",
    format: str | None = None,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool | None = None,
    act_order: str | None = None,
    head_bits: int = 16,
    damp: float = 0.01,
    calibration: Any = None,
    num_samples: int = 128,
    sample_tokens: int = 512,
    device: str = "auto",
    dtype: str = "auto",
    num_threads: int = 0,
    restart: bool = False,
    progress: bool | LayerDone | None = None,
) -> dict[str, Any]:
    """Writes a quantised checkpoint of `model` (a directory or hub id) to the new directory `out`; returns a report.

    method: "awq", "gptq" or "rtn" (round to nearest, without calibration). format: "awq", "gptq" or
    "compressed-tensors"; None: awq, gptq and compressed-tensors by method. group_size: 32, 64, 128 or -1 (a whole row).
    symmetric: no zero points; None: in all but awq files. act_order (method gptq): "weight" (the default: columns with
    large inputs first, groups as without), "group" (groups in that order too: desc_act), "none".
    head_bits: 8 writes the output head in 8 bits (compressed-tensors alone); tied embeddings are then no longer tied.
    calibration: None (text that comes with the package), a path of a .txt or .jsonl file, a list of texts or of lists of
    token ids; num_samples blocks of sample_tokens are used. device: "auto", "cpu", "cuda"; dtype: of the forward pass, "auto":
    bfloat16 on a GPU and float32 on the CPU.

    progress: show a bar; None: on a terminal or in a notebook; or a function that is called after each layer.

    A run that is cut off leaves `out`.quantizing, from which the same call goes on; restart begins anew. The same call
    gives the same bytes. Raises ValueError, ModelError, OSError, and what loading a model raises.
    """
    began = time.monotonic()
    device = _device(device)
    options = make_options(method, format, bits, group_size, symmetric, act_order, head_bits, damp, num_samples,
                           sample_tokens, device, _dtype(dtype, device))  # fmt: skip
    source = Model(resolve_model(model))
    _check_model(source, num_threads)
    check_shapes(source.shapes(), options)
    target = check_out(Path(out), source.directory)
    blocks = _blocks(source, options, calibration) if options.calibrates else None
    run = _Run(source, options, arrays_for(device), blocks, num_threads, progress)
    identity = {"model": source.fingerprint(), "options": options.as_dict(), "calibration": array_hash(blocks)}
    with PeakMemory() as memory, Work(target, identity, restart) as work:
        run.layers(work)
        run.assemble(work)
        work.finish()
    return run.report(target, time.monotonic() - began, memory)


def _device(device: str) -> str:
    if device == "auto":
        try:
            import torch

            usable = torch.cuda.is_available() and any(gpu["usable"] for gpu in _engine.device_info())
        except ImportError:
            usable = False
        return "cuda" if usable else "cpu"
    if device != "cpu" and device.partition(":")[0] != "cuda":
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    return device


def _check_model(source: Model, num_threads: int) -> None:
    """ModelError or ValueError, before any work, where the engine would refuse the config, a tensor or the threads: rounding
    to nearest loads no layer, and would make a checkpoint that nothing reads."""
    try:
        _engine.estimate(
            str(source.directory), device="cpu", dtype="float32", kv_cache_tokens=1, num_threads=num_threads
        )
    except MemoryError:
        pass  # layers are loaded one at a time: the whole need not fit


def _dtype(dtype: str, device: str) -> str:
    return ("float32" if device == "cpu" else "bfloat16") if dtype == "auto" else dtype


def _blocks(source: Model, options: Options, calibration: Any) -> np.ndarray:
    tokenizer, templates = load_tokenizer(str(source.directory), None, source.vocab_size, None, None, None)
    limit = int(source.config.get("max_position_embeddings") or options.sample_tokens)
    tokens = min(options.sample_tokens, limit, CALL_TOKENS)
    return load_blocks(calibration, tokenizer, templates, options.num_samples, tokens, source.vocab_size)


class _Run:
    def __init__(
        self,
        source: Model,
        options: Options,
        a: Arrays,
        blocks: np.ndarray | None,
        num_threads: int,
        progress: bool | LayerDone | None,
    ) -> None:
        self.source, self.options, self.a, self.blocks = source, options, a, blocks
        self.num_threads, self.progress = num_threads, progress
        self.seconds = {"forward": 0.0, "quantise": 0.0, "files": 0.0}
        self.device_bytes = 0
        self.notes: dict[int, dict[str, Any]] = {}
        self.resumed_at = 0

    # -- layers

    def layers(self, work: Work) -> None:
        source, options = self.source, self.options
        first = self.resumed_at = work.resume_at(source.num_layers, options.calibrates)
        if first == source.num_layers:
            return
        hidden = None
        if options.calibrates:
            hidden = work.load_hidden(first) if first else self._embed()
        units = len(INPUTS) + 1
        enabled = False if callable(self.progress) else self.progress
        with Progress(f"Quantising to {options.bits} bits, {options.method}", source.num_layers * units,
                      enabled=enabled, text=lambda done, total: f"layer {min(done // units + 1, source.num_layers)} "
                      f"of {source.num_layers}") as bar:  # fmt: skip
            for layer in range(first, source.num_layers):
                before = dict(self.seconds)
                self._layer(work, layer, hidden, bar, layer * units)
                source.tensors.forget()
                self.notes[layer]["seconds"] = {name: round(self.seconds[name] - before[name], 3) for name in before}
                bar.update((layer + 1) * units)
                if callable(self.progress):
                    self.progress(layer + 1, source.num_layers, self.notes[layer])

    def _embed(self) -> np.ndarray:
        assert self.blocks is not None
        hidden = self.source.embed(self.blocks.reshape(-1))
        return hidden.reshape(*self.blocks.shape, self.source.hidden_size)

    def _layer(self, work: Work, index: int, hidden: np.ndarray | None, bar: Progress, done: int) -> None:
        options, source = self.options, self.source
        layer = Layer(source, index)
        inputs = None
        if hidden is not None:
            with self._loaded(work, index, layer.stored, None) as slice_:
                shapes = {linear: values.shape for linear, values in layer.weights.items()}
                # AWQ's next layer sees this one as it was, GPTQ's as it will be.
                inputs = collect(self.a, slice_, hidden, shapes, self._batch(hidden), keep=options.method == "awq")
                self._look_at_memory()
        steps = iter(range(done + 2, done + 10))
        bar.update(done + 1)
        began = time.monotonic()
        result = quantize_layer(self.a, layer, inputs, options, source.scale_dtype, lambda: bar.update(next(steps)))
        self._look_at_memory()
        self.seconds["quantise"] += time.monotonic() - began
        self.notes[index] = result.notes
        if hidden is not None and options.method == "gptq":
            config = self._quantization_config(16)
            with self._loaded(work, index, result.tensors, config) as slice_:
                run_layer(slice_, hidden, self._batch(hidden), None, keep=True)
        began = time.monotonic()
        work.save_layer(index, {source.layer_name(index, rest): tensor for rest, tensor in result.tensors.items()})
        if hidden is not None and index + 1 < source.num_layers:
            work.save_hidden(index + 1, hidden)
        self.seconds["files"] += time.monotonic() - began

    def _batch(self, hidden: np.ndarray) -> int:
        return max(1, CALL_TOKENS // hidden.shape[1])

    def _loaded(self, work: Work, layer: int, tensors: dict[str, Stored], quantization: Any) -> Any:
        return _Slice(self, work.path / "slice", layer, tensors, quantization)

    def _look_at_memory(self) -> None:
        self.device_bytes = max(self.device_bytes, self.a.memory_bytes())

    def _quantization_config(self, head_bits: int) -> dict[str, Any]:
        o = self.options
        return quantization_config(
            o.format, o.bits, o.group_size, o.symmetric, o.act_order == "group", head_bits, o.damp
        )

    # -- the new checkpoint

    def assemble(self, work: Work) -> None:
        """All files of the new checkpoint in work.new."""
        began = time.monotonic()
        source, options = self.source, self.options
        shutil.rmtree(work.path / "slice", ignore_errors=True)
        shutil.rmtree(work.new, ignore_errors=True)
        work.new.mkdir()
        config = {**source.config, "quantization_config": self._quantization_config(options.head_bits)}
        tensors = {"model.embed_tokens.weight": source.tensors["model.embed_tokens.weight"]}
        for layer in range(source.num_layers):
            tensors |= read_file(work.layer_path(layer))[1]
        tensors["model.norm.weight"] = source.tensors["model.norm.weight"]
        if options.head_bits == 8:
            head = source.tensors[source.head_name]
            tensors |= quantize_head(self.a, head, GridSpec(8, True), options.group_size, source.scale_dtype)
            config["tie_word_embeddings"] = False
        elif source.head_name == "lm_head.weight":
            tensors["lm_head.weight"] = source.tensors["lm_head.weight"]
        _write_shards(work.new, tensors)
        write_parts(work.new / "config.json", [json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"])
        for path in source.other_files():
            write_parts(work.new / path.name, [path.read_bytes()])
        self.seconds["files"] += time.monotonic() - began

    def report(self, out: Path, seconds: float, memory: PeakMemory) -> dict[str, Any]:
        files = sorted(out.glob("*.safetensors"))
        return {
            "out": str(out), **self.options.as_dict(), "arrays": self.a.name,
            "calibration_tokens": 0 if self.blocks is None else int(self.blocks.size),
            "seconds": round(seconds, 3), "seconds_by_phase": {key: round(value, 3) for key, value in self.seconds.items()},
            "resumed_at_layer": self.resumed_at, "bytes": sum(path.stat().st_size for path in files),
            "source_bytes": sum(path.stat().st_size for path in self.source.tensors.paths),
            "peak_host_bytes": memory.own_bytes, "peak_resident_bytes": memory.resident_bytes,
            "peak_device_bytes": self.device_bytes, "layers": self.notes,
        }  # fmt: skip


class _Slice:
    """One layer in the engine, for the length of a with statement."""

    def __init__(self, run: _Run, directory: Path, layer: int, tensors: dict[str, Stored], quantization: Any) -> None:
        self._run = run
        self._arguments = (directory, layer, tensors, quantization)
        self._directory = directory

    def __enter__(self) -> _engine.Layers:
        self._began = time.monotonic()
        run = self._run
        run.source.write_slice(*self._arguments)
        self._layers: _engine.Layers = _engine.Layers(
            str(self._directory), device=run.options.device, dtype=run.options.dtype, max_tokens=CALL_TOKENS,
            num_threads=run.num_threads,
        )  # fmt: skip
        return self._layers

    def __exit__(self, *exc_info: object) -> None:
        layers = self.__dict__.pop("_layers")
        if exc_info[0] is None:  # else a traceback may hold rows of a tap: the layers go with it
            layers.close()
        self._run.seconds["forward"] += time.monotonic() - self._began


def _shards(tensors: dict[str, Stored]) -> Iterator[dict[str, Stored]]:
    part: dict[str, Stored] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.size_bytes > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.size_bytes
    yield part


def _write_shards(directory: Path, tensors: dict[str, Stored]) -> None:
    parts = list(_shards(tensors))
    if len(parts) == 1:
        write_file(directory / "model.safetensors", parts[0])
        return
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_file(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.size_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_parts(directory / "model.safetensors.index.json", [json.dumps(index, indent=1).encode()])
