"""The qwen-fast command: generate, chat, serve, ui, info, bench, doctor. `python -m qwen_fast` is the same.

Modules are imported where they are needed: the time from `qwen-fast generate` to its first token is a promise.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__


def json_option(text: str) -> Any:
    """The value of an option that takes JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise argparse.ArgumentTypeError(f"not JSON: {shown!r}: {error}") from None


def layers_option(text: str) -> tuple[int, ...]:
    """Layer indices, such as 0,27."""
    try:
        return tuple(int(one) for one in text.split(",") if one.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layer indices, such as 0,27") from None


_SAMPLING = (  # option, type, help; the field is the option's name
    ("max-tokens", int, "most tokens to generate (default: until the model ends)"),
    ("min-tokens", int, "no end before so many tokens"),
    ("temperature", float, "0: always the most likely token"),
    ("top-p", float, "keep the likeliest tokens that sum to this probability"),
    ("top-k", int, "keep so many of the likeliest tokens (0: all)"),
    ("min-p", float, "keep tokens at least so likely, relative to the likeliest"),
    ("repetition-penalty", float, "above 1: repeat less, prompt and output"),
    ("presence-penalty", float, "-2 to 2, over the output"),
    ("frequency-penalty", float, "-2 to 2, over the output"),
    ("seed", int, "the same seed gives the same text"),
)
_ENGINE = (
    ("device", str, "auto, cpu, cuda, cuda:1 (a GPU by number)"),
    ("dtype", str, "auto, bfloat16, float16, float32"),
    ("quantization", str, "auto, none, w4, awq, gptq, compressed-tensors"),
    ("activation-dtype", str, "auto, int8, float32"),
    ("kv-cache-dtype", str, "auto, bfloat16, float32, fp8_e4m3 (fp8), int8, int4, nf4"),
    ("kv-cache-16bit-window", int, "beside 8 or 4 bits: newest positions that are read in 16 bits (default 0)"),
    ("kv-cache-16bit-layers", layers_option, "beside 8 or 4 bits: layers whose cache has 16 bits, such as 0,27"),
    ("lm-head-dtype", str, "auto, model, int8, int4"),
    ("block-size", int, "tokens in a KV cache block: 16, 32, 64, 128"),
    ("max-model-len", int, "prompt and output together, tokens"),
    ("max-num-seqs", int, "sequences in one step"),
    ("max-num-batched-tokens", int, "tokens in one step"),
    ("tensor-parallel-size", int, "GPUs (or ranks of CPU threads) that each hold a part of every layer (default 1)"),
    ("tensor-parallel-comm", str, "how these GPUs reach each other: auto, peer, nccl"),
    (
        "watchdog-seconds",
        float,
        "so long a step hangs: ranks fail, and serve ends the process (default 120, CPU 1800; 0: off)",
    ),
    ("kv-cache-memory", str, "such as 6GiB"),
    ("kv-cache-tokens", int, "KV cache size in tokens"),
    (
        "memory-utilization",
        float,
        "share of the free memory for weights and cache (default: 0.5, cache of bounded size)",
    ),
    ("gpu-memory-utilization", float, "the same, by vLLM's name"),
    ("memory", str, "weights, workspace and KV cache together at most this, such as 6GiB"),
    ("cpu-offload", str, "embeddings: they stay in the host's memory (GPU)"),
    ("cpu-offload-gb", float, "so many GiB of layers stay in the host's memory too (GPU)"),
    (
        "rope-scaling",
        json_option,
        'JSON, such as {"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}',
    ),
    ("hf-overrides", json_option, "JSON laid over config.json"),
    ("load-format", str, "auto, dummy (random weights)"),
    ("num-threads", int, "CPU threads (default: all of this process)"),
    ("isa", str, "auto, scalar, avx2, avx512, avx512_vnni"),
    ("tokenizer", str, "directory or hub id to take the tokenizer from"),
    ("chat-template", str, "file with a jinja chat template"),
    ("revision", str, "branch, tag or commit of a hub id"),
    ("download-dir", str, "hub cache to use"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0, 1 (it failed), 2 (wrong arguments), 130 (Ctrl-C)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read us has gone. Python flushes stdout once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, MemoryError):
            said = f"out of memory: {said}"
        print(f"qwen-fast: error: {said}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, TypeError, NotImplementedError)) else 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-fast", description="Runs the dense Qwen2.5 models on your own hardware."
    )
    parser.add_argument("--version", action="version", version=f"qwen-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(
        commands, "generate", _late("cli_generate", "run_generate"), "answer one prompt, streaming to standard output"
    )
    generate.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the prompt; standard input if it is missing or '-'"
    )
    form = generate.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", help="apply the chat template (the default where the model has one)"
    )
    form.add_argument("--raw", action="store_true", help="continue the prompt as it is")
    generate.add_argument("--system", help="system message")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    generate.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")
    generate.add_argument("-n", type=int, default=1, help="number of answers (default 1)")
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    generate.add_argument("--stats", action="store_true", help="print counts and times to standard error")
    _options(generate, "sampling", _SAMPLING)
    _model_options(generate)

    chat = _command(
        commands, "chat", _late("cli_generate", "run_chat"), "talk with the model; Ctrl-C stops an answer, /exit leaves"
    )
    chat.add_argument("--system", help="system message")
    _options(chat, "sampling", _SAMPLING)
    _model_options(chat)

    _add_serve(commands)

    info = _command(commands, "info", _late("cli_tools", "run_info"), "a model's shape, and the memory it would take")
    info.add_argument("model_name", nargs="?", metavar="MODEL", help="demo (default), a directory or a hub id")
    info.add_argument("--gpu", action="store_true", help="the plan for the GPU: --device cuda")
    info.add_argument("--json", action="store_true", help="print JSON")
    _model_options(info)

    bench = _command(commands, "bench", _late("cli_tools", "run_bench"), "measure prefill and decode speed")
    bench.add_argument("--input-len", type=int, default=512, help="prompt tokens (default 512)")
    bench.add_argument("--output-len", type=int, default=128, help="output tokens (default 128)")
    bench.add_argument("--batch", type=int, default=1, help="sequences at once (default 1)")
    bench.add_argument("--repeat", type=int, default=3, help="runs; the fastest counts (default 3)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    _model_options(bench)

    doctor = _command(
        commands, "doctor", _late("cli_tools", "run_doctor"), "what this installation and this machine offer"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")

    cost = _command(
        commands, "cost", _late("cost.cost_cli", "run"), "measure what a model costs here: memory, time, energy, money"
    )
    cost.add_argument("model_name", nargs="?", metavar="MODEL", help="demo (default), a directory or a hub id")
    importlib.import_module(".cost.cost_cli", __package__).add_arguments(cost)
    _model_options(cost)

    plan = _command(
        commands, "plan", _late("cost.plan_cli", "run"), "memory, speed and money on a GPU that is not here"
    )
    importlib.import_module(".cost.plan_cli", __package__).add_arguments(plan)

    quality = _command(
        commands, "quality", _late("quality.quality_cli", "run"), "measure what fewer bits cost in quality"
    )
    quality.add_argument("model_name", nargs="?", metavar="MODEL", help="demo (default), a directory or a hub id")
    importlib.import_module(".quality.quality_cli", __package__).add_arguments(quality, _ENGINE, _METAVAR)
    _model_options(quality)

    quantize = _command(
        commands, "quantize", _late("quantize.quantize_cli", "run"), "write a checkpoint of 4 or 8 bits: AWQ, GPTQ"
    )
    importlib.import_module(".quantize.quantize_cli", __package__).add_arguments(quantize)

    cgi = _command(commands, "cgi", run_cgi, "hand a CGI request to a server started with `serve --fastcgi`")
    cgi.add_argument("--connect", required=True, metavar="ADDRESS", help="unix:/path/of/the.sock or 127.0.0.1:PORT")
    return parser


def _add_serve(commands: Any) -> None:
    from .server.arguments import add_arguments
    from .ui.arguments import add_page, add_url

    serve = _command(commands, "serve", _run_serve, "answer OpenAI's API over HTTP (needs the extra [server])")
    ui = _command(commands, "ui", _late("ui.run", "run_ui"), "a chat page in the browser (needs the extra [ui])")
    for parser in (serve, ui):
        parser.add_argument("model_name", nargs="?", metavar="MODEL", help="demo (default), a directory or a hub id")
        _model_options(parser)
        add_arguments(parser)
        add_page(parser)
    serve.add_argument("--ui", action="store_true", help="serve the chat page at /ui too (needs the extra [ui])")
    add_url(ui)


def _run_serve(args: argparse.Namespace) -> int:
    args.model = args.model_name or args.model
    run = _late("ui.run", "run_beside") if args.ui else _late("server.serve", "run_serve")
    return int(run(args))


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _options(parser: argparse.ArgumentParser, title: str, rows: Sequence[tuple[str, Any, str]]) -> None:
    group = parser.add_argument_group(title)
    for name, kind, text in rows:
        group.add_argument(f"--{name}", type=kind, help=text.replace("%", "%%"), metavar=_METAVAR[kind])


_METAVAR = {int: "N", float: "X", str: "TEXT", json_option: "JSON", layers_option: "LAYERS"}


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", "-m", default="demo", help="demo (default), a directory or a hub id")
    _options(parser, "engine", _ENGINE)
    parser.add_argument("--no-prefix-caching", action="store_true", help="do not share equal prompt beginnings")
    parser.add_argument("--batch-invariant", action="store_true", help="the same bits beside any neighbours (GPU)")
    parser.add_argument("--enforce-eager", action="store_true", help="capture no graphs (GPU)")


def _late(module: str, name: str) -> Any:
    """A function of a module that is imported when it runs."""

    def run(args: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(f".{module}", __package__), name)(args)
        return code

    return run


def run_cgi(args: argparse.Namespace) -> int:
    from .server import cgi

    return cgi.main(["--connect", args.connect])


def given(args: argparse.Namespace, rows: Sequence[tuple[str, Any, str]]) -> dict[str, Any]:
    """The options of a table that were given, by field name."""
    names = [row[0].replace("-", "_") for row in rows]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for LLM."""
    options = given(args, _ENGINE)
    if args.no_prefix_caching:
        options["enable_prefix_caching"] = False
    for name in ("batch_invariant", "enforce_eager"):
        if getattr(args, name):
            options[name] = True
    return options


def sampling_params(args: argparse.Namespace, **more: Any) -> Any:
    """SamplingParams of the options that were given, and more fields."""
    from .params import SamplingParams

    return SamplingParams(**given(args, _SAMPLING), **more)
