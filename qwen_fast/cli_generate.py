"""The commands that answer: generate, chat."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any


def run_generate(args: argparse.Namespace) -> int:
    from . import cli

    prompt = args.prompt
    if prompt is None or prompt == "-":
        if sys.stdin.isatty() and prompt is None:
            raise ValueError("no prompt: give one as an argument or on standard input")
        prompt = sys.stdin.read().removesuffix("\n")
    params = cli.sampling_params(args, n=args.n, stop=args.stop, ignore_eos=args.ignore_eos)
    from .llm import LLM

    with LLM(args.model, **cli.engine_arguments(args)) as llm, _room_explained(llm):
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
    from . import cli

    params = cli.sampling_params(args)
    from .llm import LLM

    interactive = sys.stdin.isatty()
    if interactive:
        try:
            import readline  # noqa: F401  input() then edits lines and remembers them
        except ImportError:
            pass
    beginning = [{"role": "system", "content": args.system}] if args.system is not None else []
    with LLM(args.model, **cli.engine_arguments(args)) as llm:
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
