"""What does `qwen-fast serve` deliver under load, and which share of the engine's own throughput is that?

Models: the real shapes with random 4-bit weights on the GPU, or the demo on the CPU. For each workload (tokens in, tokens
out) and each number of concurrent requests:

engine  the same requests and no server: submitted to the engine in this process, a new one as soon as the oldest ends. Only
        the oldest is read, so that Python has next to nothing to do; LLM and AsyncLLM read every increment of each.
closed  the server, as a process of its own, with so many requests open at any moment.
poisson the server, with requests that arrive at random (exponential gaps, seeded) at --load times the rate of requests that
        the closed loop ended with: what users see who do not wait for each other.

tokens/s counts the output tokens from the first request's start to the last one's end. TTFT: from the moment a request is
due until its first event. TPOT: from its first event to its last, by the tokens after the first. Several client processes
read the streams (serving_clients.py); their share of a CPU stands beside each row, as does that of the server's event loop.

Before any timing the engine's logits are checked, and the server has to give the engine's tokens. The engine runs first
and decides how many requests a row has: --per-slot for each concurrent one, fewer where --level-seconds end; the server gets
the same. After --budget-seconds of a model no further row is begun; those left out are named in the results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from common import HERE, finish, logits_hash, save
from gpu_common import SHAPES, check_against_cpu, check_logits, gpu_environment, percent
from serving_clients import Clients, Record, random_prompt
from serving_server import Server, model_options

WORKLOADS = "120x280,1850x620,310x1100"
TARGET_SHARE = 0.90
TARGET_CONCURRENCY = {"7B": 256, "0.5B": 32}
BUSY_CLIENT = 0.8  # of a CPU: then the load may be what is measured
WARM_TOKENS = 16
WARM_NUMBER = 1000  # the first warm row; rows that count have smaller numbers
CHECK_PROMPT, CHECK_TOKENS = 100, 32


@dataclass
class Level:
    """One row: what the engine and the server do with the same requests."""

    prompt_tokens: int
    new_tokens: int
    concurrent: int
    number: int  # counts the rows: no two share a prompt
    requests: int = 0
    engine: dict[str, Any] = field(default_factory=dict)

    def seeds(self, count: int, arrivals: str = "closed") -> list[int]:
        first = 1_000_000 * (2 * self.number + (arrivals == "poisson") + 1)
        return list(range(first, first + count))

    def __str__(self) -> str:
        return f"{self.prompt_tokens}/{self.new_tokens}, {self.concurrent} concurrent"


# -- the engine --------------------------------------------------------------------------------------------------


def run_engine(engine: Any, prompts: Sequence[list[int]], level: Level, seconds: float) -> tuple[int, dict[str, Any]]:
    """A closed loop in this process: how many requests it ran, at least one for each concurrent one and no new one
    after `seconds`, and what it gave."""
    options = {"max_tokens": level.new_tokens, "temperature": 0.0, "ignore_eos": True}
    running: deque[Any] = deque()
    outputs = []
    waiting = iter(prompts)
    begin = time.perf_counter()
    running.extend(engine.submit(prompt, **options) for prompt in islice(waiting, level.concurrent))
    while running:
        outputs.append(finish(running.popleft()))
        if time.perf_counter() - begin < seconds:
            running.extend(engine.submit(prompt, **options) for prompt in islice(waiting, 1))
    took = time.perf_counter() - begin
    if any(len(output["token_ids"]) != level.new_tokens for output in outputs):
        raise RuntimeError(f"{level}: a request did not give {level.new_tokens} tokens")
    first = [output["first_token_time"] - output["arrival_time"] for output in outputs]
    apart = [output["last_token_time"] - output["first_token_time"] for output in outputs]
    return len(outputs), {
        "seconds": took,
        "tokens_per_s": len(outputs) * level.new_tokens / took,
        "ttft_ms": percentiles([1e3 * one for one in first]),
        "tpot_ms": percentiles([1e3 * one / max(level.new_tokens - 1, 1) for one in apart]),
    }


def engine_phase(
    name: str, options: dict[str, Any], levels: Sequence[Level], args: argparse.Namespace
) -> tuple[dict[str, Any], list[Level]]:
    """The checks and the engine's own figures, with the model loaded once; the levels that there was time for."""
    from qwen_fast import LLM

    begin = time.monotonic()
    done = []
    with LLM(**options, generation_config="vllm", progress=False) as llm:
        engine, vocab_size = llm._engine, llm.vocab_size
        digest = logits_hash(engine) if name == "demo" else check_logits(engine)
        info = engine.info()
        print(f"\n{name}: {info['description']}; logits {digest}, twice the same", flush=True)
        engine.reset_prefix_cache()
        expected = finish(
            engine.submit(check_prompt(vocab_size), max_tokens=CHECK_TOKENS, temperature=0.0, ignore_eos=True)
        )
        for warm in warm_levels(levels):
            run_engine(engine, [random_prompt(s, WARM_TOKENS, vocab_size) for s in warm.seeds(warm.requests)], warm, 0)
        for level in levels:
            if args.budget_seconds is not None and time.monotonic() - begin > 0.45 * args.budget_seconds:
                break
            seeds = level.seeds(requests_of(level.concurrent, args))
            prompts = [random_prompt(seed, level.prompt_tokens, vocab_size) for seed in seeds]
            level.requests, level.engine = run_engine(engine, prompts, level, args.level_seconds)
            print(f"  engine, {level}: {level.engine['tokens_per_s']:,.0f} tokens/s", flush=True)
            done.append(level)
        said = {
            "logits": digest,
            "vocab_size": vocab_size,
            "tokens": expected["token_ids"],
            "info": info["description"],
        }
    return said, done


def sizes_for(levels: Sequence[Level]) -> dict[str, int]:
    """The engine's options that the largest level needs, and the check."""
    check = CHECK_PROMPT + CHECK_TOKENS
    length = {level.number: level.prompt_tokens + level.new_tokens for level in levels}
    return {
        "max_model_len": max(check, *length.values()) + 64,
        "max_num_seqs": max(level.concurrent for level in levels),
        "kv_cache_tokens": max(check, *(level.concurrent * (length[level.number] + 64) for level in levels)) + 64,
    }


def warm_levels(levels: Sequence[Level]) -> list[Level]:
    """Short requests, for each number of concurrent ones: graphs and buffers are made before anything is timed."""
    each = sorted({level.concurrent for level in levels})
    return [Level(WARM_TOKENS, WARM_TOKENS, one, WARM_NUMBER + i, one) for i, one in enumerate(each)]


def requests_of(concurrent: int, args: argparse.Namespace) -> int:
    return max(args.least_requests, round(args.per_slot * concurrent))


def check_prompt(vocab_size: int) -> list[int]:
    return random_prompt(7, CHECK_PROMPT, vocab_size)


# -- the server --------------------------------------------------------------------------------------------------


def check_server(server: Server, said: dict[str, Any]) -> None:
    """RuntimeError unless the server gives the engine's tokens."""
    prompt = check_prompt(said["vocab_size"])
    body = {"prompt": prompt, "max_tokens": CHECK_TOKENS, "temperature": 0, "ignore_eos": True}
    found = server.ask({**body, "return_token_ids": True})["choices"][0]["token_ids"]
    if found != said["tokens"]:
        raise RuntimeError(f"the server gave the tokens {found}, the engine {said['tokens']}")


def run_server(
    server: Server, clients: Clients, level: Level, arrivals: Sequence[float] | None, vocab_size: int, seconds: float
) -> dict[str, Any]:
    seeds = level.seeds(level.requests, "closed" if arrivals is None else "poisson")
    cpu = server.loop_seconds()
    records, begin, busy = clients.run(
        seeds,
        level.concurrent,
        arrivals,
        seconds,
        prompt_tokens=level.prompt_tokens,
        new_tokens=level.new_tokens,
        vocab_size=vocab_size,
    )
    cpu = server.loop_seconds() - cpu
    found = summary(records, begin)
    found |= {"loop_share": cpu / found["seconds"], "loop_us_per_token": 1e6 * cpu / (len(records) * level.new_tokens)}
    return {**found, "client_share": max(busy), "clients": len(busy)}


def summary(records: Sequence[Record], begin: float) -> dict[str, Any]:
    took = max(record.last for record in records) - begin
    tokens, events = (sum(getattr(record, name) for record in records) for name in ("tokens", "events"))
    return {
        "seconds": took,
        "tokens_per_s": tokens / took,
        "requests_per_s": len(records) / took,
        "mean_open": sum(record.last - record.due for record in records) / took,
        "tokens_per_event": tokens / max(events - len(records), 1),  # one more for each has its usage
        "bytes": sum(record.size for record in records),
        "ttft_ms": percentiles([1e3 * (record.first - record.due) for record in records]),
        "tpot_ms": percentiles([1e3 * (r.last - r.first) / max(r.tokens - 1, 1) for r in records]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The value that a share of all do not exceed."""
    ordered = sorted(values)
    return {f"p{share}": ordered[-(-len(ordered) * share // 100) - 1] for share in (50, 99)}


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start; `rate` a second on average."""
    chance, now = random.Random(seed), 0.0
    return [now := now + chance.expovariate(rate) for _ in range(count)]


def server_phase(
    options: dict[str, Any], said: dict[str, Any], levels: Sequence[Level], args: argparse.Namespace, directory: Path
) -> Iterator[dict[str, Any]]:
    """A row for each level and way of arriving."""
    begin, vocab_size = time.monotonic(), said["vocab_size"]
    with contextlib.closing(Server(options, directory, args.uds)) as server:
        check_server(server, said)
        with contextlib.closing(Clients(args.clients, server.address)) as clients:
            for warm in warm_levels(levels):
                run_server(server, clients, warm, None, vocab_size, 120)
            for level in levels:
                if args.budget_seconds is not None and time.monotonic() - begin > 0.55 * args.budget_seconds:
                    return
                limit = 60 + 20 * level.engine["seconds"]
                closed = run_server(server, clients, level, None, vocab_size, limit)
                yield {"arrivals": "closed", "level": level, "server": closed}
                if level.concurrent in args.poisson:
                    rate = args.load * closed["requests_per_s"]
                    arrivals = poisson_arrivals(level.requests, rate, args.seed + level.number)
                    found = run_server(server, clients, level, arrivals, vocab_size, limit / args.load)
                    yield {"arrivals": "poisson", "level": level, "server": found, "offered_per_s": rate}


# -- results -----------------------------------------------------------------------------------------------------


def row_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    level = found.pop("level")
    row = {"model": name, **found, **{key: value for key, value in vars(level).items() if key != "number"}}
    if row["arrivals"] == "closed":
        row["share"] = row["server"]["tokens_per_s"] / row["engine"]["tokens_per_s"]
    return row


def head_line() -> str:
    return (
        "      in/out  arrivals conc. requests  engine tok/s  server tok/s  share   TTFT P50/P99 ms    TPOT P50/P99 ms  "
        "tok/event  loop  clients"
    )


def line_of(row: dict[str, Any]) -> str:
    server, closed = row["server"], row["arrivals"] == "closed"
    engine = f"{row['engine']['tokens_per_s']:,.0f}" if closed else f"{row['offered_per_s']:,.1f} req/s"
    first, apart = (
        f"{server[what]['p50']:,.{digits}f} / {server[what]['p99']:,.{digits}f}"
        for what, digits in (("ttft_ms", 1), ("tpot_ms", 2))
    )
    place = f"{row['prompt_tokens']}/{row['new_tokens']}"
    return (
        f"  {place:>10}  {row['arrivals']:8} {row['concurrent']:5} {row['requests']:8}  {engine:>12}  "
        f"{server['tokens_per_s']:12,.0f}  {percent(row.get('share')):>5}  {first:>16}  {apart:>17}  "
        f"{server['tokens_per_event']:9.1f}  {percent(server['loop_share'])}  {percent(server['client_share']):>7}"
    )


def verdict(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The least share of the engine's throughput up to the model's target, and where the server does not follow the
    engine: its best rate among the rows that miss the share, and how busy its event loop was; None where none does."""
    closed = [row for row in rows if row["model"] == name and row["arrivals"] == "closed"]
    bound = TARGET_CONCURRENCY.get(name, 0)
    asked = [row["share"] for row in closed if row["concurrent"] <= bound]
    missed = [row["server"] for row in closed if row["share"] < TARGET_SHARE]
    best = max(missed, key=lambda server: server["tokens_per_s"], default=None)
    least = min(asked, default=None)
    return {
        "up_to": bound,
        "least_share": least,
        "met": None if least is None else least >= TARGET_SHARE,
        "saturation": best and {name: best[name] for name in ("tokens_per_s", "loop_share")},
        "busiest_client": max((row["server"]["client_share"] for row in closed), default=None),
    }


def print_verdict(name: str, found: dict[str, Any]) -> None:
    if found["least_share"] is not None:
        met = "met" if found["met"] else "missed"
        print(
            f"{name}: at least {percent(found['least_share']).strip()} of the engine's throughput up to "
            f"{found['up_to']} concurrent (target {percent(TARGET_SHARE).strip()}: {met})"
        )
    if found["saturation"] is not None:
        rate, loop = found["saturation"]["tokens_per_s"], percent(found["saturation"]["loop_share"]).strip()
        print(
            f"{name}: where the share is less, the server gives up to {rate:,.0f} tokens/s, its event loop {loop} busy"
        )
    if (busy := found["busiest_client"]) is not None and busy > BUSY_CLIENT:
        print(f"{name}: a client process was busy {percent(busy).strip()} of the time: give more --clients")


# -- the command -------------------------------------------------------------------------------------------------


def numbers(text: str) -> list[int]:
    """1,4,16"""
    return [int(one) for one in text.split(",") if one]


def workloads(text: str) -> list[tuple[int, int]]:
    """120x280,1850x620"""
    pairs = [one.split("x") for one in text.split(",")]
    return [(int(prompt), int(new)) for prompt, new in pairs]


def arguments() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cpus = len(os.sched_getaffinity(0))
    result.add_argument("--models", default="0.5B,7B", help="by comma: 0.5B, 7B (GPU), demo (CPU)")
    result.add_argument("--workloads", type=workloads, default=workloads(WORKLOADS), help="tokens in x out, by comma")
    result.add_argument("--concurrency", type=numbers, default=[1, 4, 16, 32, 64, 128, 256], help="by comma")
    result.add_argument("--poisson", type=numbers, help="concurrencies with a Poisson row; '': none (default: all)")
    result.add_argument("--load", type=float, default=0.7, help="of Poisson arrivals (default 0.7)")
    result.add_argument("--per-slot", type=float, default=3, help="requests for each concurrent one (default 3)")
    result.add_argument("--least-requests", type=int, default=8, help="requests of a row (default 8)")
    result.add_argument("--level-seconds", type=float, default=10, help="no new request after it (default 10)")
    result.add_argument("--budget-seconds", type=float, help="of a model; rows beyond it are left out")
    result.add_argument(
        "--clients", type=int, default=max(1, min(6, cpus // 2)), help="processes (default %(default)s)"
    )
    result.add_argument("--uds", action="store_true", help="a Unix socket in place of TCP")
    result.add_argument("--head", default="model", help="lm_head_dtype (default model)")
    result.add_argument("--device", default="cuda", help="of 0.5B and 7B (default cuda)")
    result.add_argument("--threads", type=int, help="of an engine on the CPU (default: all CPUs)")
    result.add_argument("--seed", type=int, default=1, help="of the arrivals")
    result.add_argument("--skip-check", action="store_true", help="do not compare the GPU with the CPU first")
    result.add_argument("--commit", help="for the results, where there is no git")
    result.add_argument("--save", action="store_true", help="write benchmarks/results/<date>-serving.json")
    result.add_argument("--results", type=Path, default=HERE / "results", help="the folder for --save")
    return result


def measure(name: str, args: argparse.Namespace, rows: list[dict[str, Any]], said: dict[str, Any]) -> None:
    """Adds a model's rows; said: what stands beside them in the results."""
    pairs = [(pair, concurrent) for pair in args.workloads for concurrent in args.concurrency]
    levels = [Level(pair[0], pair[1], concurrent, number) for number, (pair, concurrent) in enumerate(pairs)]
    with tempfile.TemporaryDirectory() as directory:
        if name != "demo" and args.device != "cpu" and not args.skip_check:
            checked = {"quantization": "w4", "lm_head_dtype": args.head}
            said["checks"][name] = check_against_cpu(name, Path(directory), checked)
        options = model_options(name, Path(directory), sizes_for(levels), args.device, args.head, args.threads)
        found, done = engine_phase(name, options, levels, args)
        said["checks"].setdefault(name, {})["logits"] = found["logits"]
        said["left_out"] += [f"{name}, {level}" for level in levels if level not in done]
        print(head_line(), flush=True)
        seen = set()
        for result in server_phase(options, found, done, args, Path(directory)) if done else ():
            seen.add(result["level"].number)
            rows.append(row_of(name, result))
            print(line_of(rows[-1]), flush=True)
            save("serving", rows, args.save, args.results, False, **said)
        said["left_out"] += [f"{name}, {level}" for level in done if level.number not in seen]
    said["verdicts"][name] = verdict(name, rows)
    print_verdict(name, said["verdicts"][name])


def main() -> None:
    args = arguments().parse_args()
    args.poisson = args.concurrency if args.poisson is None else args.poisson
    rows: list[dict[str, Any]] = []
    said: dict[str, Any] = {**gpu_environment(args), "checks": {}, "verdicts": {}, "left_out": []}
    for name in args.models.split(","):
        if name not in (*SHAPES, "demo"):
            raise SystemExit(f"--models: {name!r} is none of {', '.join(SHAPES)}, demo")
        measure(name, args, rows, said)
    for what in said["left_out"]:
        print(f"left out: {what}")
    save("serving", rows, args.save, args.results, **said)


if __name__ == "__main__":
    main()
