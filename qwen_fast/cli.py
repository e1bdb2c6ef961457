"""The qwen-fast command: generate, chat, serve, ui, info, bench, doctor. `python -m qwen_fast` is the same.

Modules are imported where they are needed: the time from `qwen-fast generate` to its first token is a promise.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from . import __version__


def json_option(text: str) -> Any:
    """The value of an option that takes JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise argparse.ArgumentTypeError(f"not JSON: {shown!r}: {error}") from None


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
    ("kv-cache-dtype", str, "auto, bfloat16, float32"),
    ("lm-head-dtype", str, "auto, model, int8, int4"),
    ("block-size", int, "tokens in a KV cache block: 16, 32, 64, 128"),
    ("max-model-len", int, "prompt and output together, tokens"),
    ("max-num-seqs", int, "sequences in one step"),
    ("max-num-batched-tokens", int, "tokens in one step"),
    ("tensor-parallel-size", int, "1"),
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

    generate = _command(commands, "generate", run_generate, "answer one prompt, streaming to standard output")
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

    chat = _command(commands, "chat", run_chat, "talk with the model; Ctrl-C stops an answer, /exit leaves")
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

    cost = _command(commands, "cost", _late("cost.cost_cli", "run"), "measure what a model costs here: memory, time, energy, money")
    cost.add_argument("model_name", nargs="?", metavar="MODEL", help="demo (default), a directory or a hub id")
    importlib.import_module(".cost.cost_cli", __package__).add_arguments(cost)
    _model_options(cost)

    plan = _command(commands, "plan", _late("cost.plan_cli", "run"), "memory, speed and money on a GPU that is not here")
    importlib.import_module(".cost.plan_cli", __package__).add_arguments(plan)

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


_METAVAR = {int: "N", float: "X", str: "TEXT", json_option: "JSON"}


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


def _sampling_params(args: argparse.Namespace, **more: Any) -> Any:
    from .params import SamplingParams

    return SamplingParams(**given(args, _SAMPLING), **more)


def run_generate(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt is None or prompt == "-":
        if sys.stdin.isatty() and prompt is None:
            raise ValueError("no prompt: give one as an argument or on standard input")
        prompt = sys.stdin.read().removesuffix("\n")
    params = _sampling_params(args, n=args.n, stop=args.stop, ignore_eos=args.ignore_eos)
    from .llm import LLM

    with LLM(args.model, **engine_arguments(args)) as llm, _room_explained(llm):
        if args.chat or (not args.raw and (args.system is not None or llm.has_chat_template)):
            messages = [{"role": "user", "content": prompt}]
            if args.system is not None:
                messages.insert(0, {"role": "system", "content": args.system})
            stream = llm.chat(messages, params, stream=True)
        elif args.system is not None:
            raise ValueError("--system needs the chat template; leave out --raw")
        else:
            stream = llm.stream(prompt, params)
        texts, last, first_token_s = _print_stream(stream, args.n, quiet=args.json)
        if args.json:
            print(json.dumps(_as_json(args.model, texts, last), ensure_ascii=False))
        if args.stats:
            print(_stats_line(llm, last, first_token_s), file=sys.stderr)
    return 0


@contextlib.contextmanager
def _room_explained(llm: Any) -> Iterator[None]:
    """Adds what can be done to the message that a request does not fit."""
    try:
        yield
    except ValueError as error:
        if "max_model_len" in str(error):
            info = llm.info()
            most = info["max_position_embeddings"]
            advice = "shorten the prompt or lower --max-tokens"
            if info["max_model_len"] < most:
                advice += f", or raise --max-model-len and --kv-cache-tokens (the model takes up to {most} tokens)"
            error.args = (f"{error}; {advice}",)
        raise


def _print_stream(stream: Any, n: int, quiet: bool) -> tuple[list[str], list[Any], float | None]:
    """Prints increments as they come (several samples: one after the other, at the end). Returns the texts, each
    sample's last increment, and seconds from the start of the process to the first token."""
    texts = [""] * n
    last: list[Any] = [None] * n
    first_token_s = None
    for output in stream:
        if first_token_s is None and output.token_ids:
            first_token_s = process_age()
        texts[output.index] += output.text
        if output.finished:
            last[output.index] = output
        if n == 1 and output.text and not quiet:
            sys.stdout.write(output.text)
            sys.stdout.flush()
    if quiet:
        return texts, last, first_token_s
    if n == 1:
        sys.stdout.write("" if texts[0].endswith("\n") else "\n")
    for i, text in enumerate(texts if n > 1 else ()):
        print(f"--- {i + 1} of {n}\n{text}")
    return texts, last, first_token_s


def _as_json(model: str, texts: list[str], last: list[Any]) -> dict[str, Any]:
    outputs = [
        {"index": i, "text": text, "finish_reason": end.finish_reason, "stop_reason": end.stop_reason, "seed": end.seed}
        for i, (text, end) in enumerate(zip(texts, last))
    ]
    first, timings = last[0].usage, last[0].timings
    completion = sum(end.usage.completion_tokens for end in last)
    usage = {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "cached_tokens": first.cached_tokens,
    }
    times = {"queue_s": timings.queue_s, "ttft_s": timings.ttft_s, "tpot_s": timings.tpot_s, "e2e_s": timings.e2e_s}
    return {"model": model, "outputs": outputs, "usage": usage, "timings": times}


def _stats_line(llm: Any, last: list[Any], first_token_s: float | None) -> str:
    usage, timings = last[0].usage, last[0].timings
    completion = sum(end.usage.completion_tokens for end in last)
    parts = [f"{usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached)", f"{completion} output tokens"]
    parts.append(f"loaded in {llm.info()['load_seconds']:.2f} s")
    if first_token_s is not None:
        parts.append(f"first token {first_token_s:.2f} s after process start")
    if timings.ttft_s:
        parts.append(f"{timings.ttft_s * 1e3:.0f} ms after the request")
    if timings.tpot_s:
        parts.append(f"{1 / timings.tpot_s:.1f} tokens/s")
    return " · ".join([*parts, f"{last[0].finish_reason}", f"seed {last[0].seed}"])


def process_age() -> float | None:
    """Seconds since this process was started, from /proc (to 10 ms); None where there is no /proc."""
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="utf-8") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def run_chat(args: argparse.Namespace) -> int:
    params = _sampling_params(args)
    from .llm import LLM

    interactive = sys.stdin.isatty()
    if interactive:
        try:
            import readline  # noqa: F401  input() then edits lines and remembers them
        except ImportError:
            pass
    beginning = [{"role": "system", "content": args.system}] if args.system is not None else []
    with LLM(args.model, **engine_arguments(args)) as llm:
        if not llm.has_chat_template:
            raise ValueError(f"{args.model} has no chat template; use `generate --raw`, or give --chat-template")
        messages = list(beginning)
        if interactive:
            print("Ctrl-C stops an answer, /reset forgets the conversation, /exit leaves.")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                print("\n(/exit leaves)")
                continue
            if line in ("/exit", "/quit"):
                break
            if line == "/reset":
                messages = list(beginning)
            elif line.startswith("/"):
                print("commands: /reset, /exit", file=sys.stderr)
            elif line:
                _turn(llm, messages, line, params)
    return 0


def _turn(llm: Any, messages: list[dict[str, str]], line: str, params: Any) -> None:
    """One question and its answer. A refused question leaves the conversation as it was."""
    messages.append({"role": "user", "content": line})
    answer = ""
    try:
        with _room_explained(llm):
            for output in llm.chat(messages, params, stream=True):
                answer += output.text
                sys.stdout.write(output.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    except ValueError as error:
        messages.pop()
        print(f"qwen-fast: {error} (/reset forgets the conversation)", file=sys.stderr)
        return
    print(flush=True)
    messages.append({"role": "assistant", "content": answer})
