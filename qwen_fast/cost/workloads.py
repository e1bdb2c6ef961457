"""What is asked of the model: the workloads of the two studies, own lengths, a file of prompts, a recorded access log."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

QUICK_TOKENS = 256  # prompt and output of a request of a quick report, together
MAX_ITEMS = 100_000


@dataclass(frozen=True)
class Item:
    """A request: so many prompt tokens in, at most so many out. token_ids, prompt: what is asked; both None: made-up
    tokens, different in every request. ends: the model's end of text ends it."""

    prompt_tokens: int
    output_tokens: int
    token_ids: tuple[int, ...] | None = None
    prompt: Any = None
    ends: bool = False


@dataclass(frozen=True)
class Workload:
    """Requests that are asked in turn, over and over. name: short, for tables and keys. notes: what was changed about it,
    and what it cannot show. shared_tokens: made-up prompts begin with so many equal tokens. users: of a log, how many
    were being answered at once, on average."""

    name: str
    title: str
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()
    shared_tokens: int = 0
    users: int | None = None

    @property
    def mean_prompt(self) -> float:
        return sum(item.prompt_tokens for item in self.items) / len(self.items)

    @property
    def mean_output(self) -> float:
        return sum(item.output_tokens for item in self.items) / len(self.items)

    @property
    def label(self) -> str:
        return f"{self.title}, {self.mean_prompt:,.0f} in / {self.mean_output:,.0f} out"

    def requests(self, limit: int, seed: int = 0) -> Iterator[tuple[list[int], Item, int]]:
        """Prompt token ids below `limit`, their items, and how often all items were asked before (so that a prompt that
        comes again need not be found in the prefix cache); without end, the same for the same seed."""
        number = seed << 20
        shared = random.Random(7).choices(range(limit), k=self.shared_tokens)
        for round_number in itertools.count():
            for item in self.items:
                number += 1
                if item.token_ids is not None:
                    yield list(item.token_ids), item, round_number
                else:
                    own = random.Random(number).choices(range(limit), k=item.prompt_tokens)
                    yield [*shared[: item.prompt_tokens - 1], *own[min(len(shared), item.prompt_tokens - 1) :]], item, 0


def fixed(name: str, title: str, prompt_tokens: int, output_tokens: int, **more: Any) -> Workload:
    """Every request the same lengths. ValueError where one is below 1."""
    for what, value in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{what} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{what} must be at least 1, got {value}")
    return Workload(name, title, (Item(prompt_tokens, output_tokens),), **more)


STUDY_A = (
    fixed("short", "short QA", 120, 280),
    fixed("summary", "document summary", 1850, 620),
    fixed("json", "structured JSON", 310, 1100),
)
STUDY_A_USERS = (1, 16, 32)
STUDY_B = fixed("chat", "chat with history", 2048, 512)
STUDY_B_USERS = (1, 2, 4, 8, 16)


def parse_lengths(text: str) -> Workload:
    """ "512/128": prompt and output tokens."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"lengths must be IN/OUT such as 512/128, got {text!r}")
    given, wanted = (int(part) for part in parts)
    return fixed(f"{given}-{wanted}", "own lengths", given, wanted)


def scaled(workload: Workload, most_tokens: int, why: str) -> Workload:
    """The workload with requests of at most `most_tokens`, prompt and output together: longer ones keep the ratio of the
    two. A note says so. Requests with prompts of their own that are longer are left out."""
    items, shrunk, dropped = [], 0, 0
    for item in workload.items:
        total = item.prompt_tokens + item.output_tokens
        if total <= most_tokens:
            items.append(item)
        elif item.token_ids is not None:
            room = most_tokens - item.prompt_tokens
            dropped += room < 1
            shrunk += room >= 1
            if room >= 1:
                items.append(replace(item, output_tokens=room))
        else:
            shrunk += 1
            prompt = max(1, item.prompt_tokens * most_tokens // total)
            output = max(1, item.output_tokens * most_tokens // total)
            items.append(replace(item, prompt_tokens=prompt, output_tokens=output))
    if not items:
        raise ValueError(f"{workload.title}: no request fits into {most_tokens} tokens ({why})")
    notes = list(workload.notes)
    result = replace(workload, items=tuple(items))
    if shrunk:
        notes.append(
            f"scaled down from {workload.mean_prompt:,.0f} in / {workload.mean_output:,.0f} out to "
            f"{result.mean_prompt:,.0f} / {result.mean_output:,.0f}: {why}"
        )
    if dropped:
        notes.append(f"{dropped} of {len(workload.items)} prompts left out: {why}")
    return replace(result, notes=tuple(notes))


def from_jsonl(path: str | Path, output_tokens: int = 128) -> Workload:
    """A file of prompts, one JSON value a line: a text; or {"prompt": text}, {"messages": [...]} or {"prompt_token_ids":
    [...]} with, if wanted, "max_tokens" (default output_tokens). They end where the model ends them. ValueError names
    the line. The prompts are tokenised by `tokenised`."""
    items = []
    for number, value in _lines(path):
        wanted: Any = output_tokens
        if isinstance(value, dict):
            wanted = value.get("max_tokens", output_tokens)
            found = [value[key] for key in ("prompt", "messages", "prompt_token_ids") if key in value]
            if len(found) != 1:
                keys = sorted(map(str, value))
                raise ValueError(f"{path}:{number}: needs one of prompt, messages and prompt_token_ids, has {keys}")
            prompt = found[0]
        else:
            prompt = value
        if not isinstance(prompt, (str, list)) or not prompt:
            raise ValueError(f"{path}:{number}: a prompt must be a text, messages or token ids, got {prompt!r}")
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise ValueError(f"{path}:{number}: max_tokens must be an integer of at least 1, got {wanted!r}")
        items.append(Item(0, wanted, None, prompt, True))
    if not items:
        raise ValueError(f"{path}: no prompts in it")
    return Workload("prompts", f"prompts of {Path(path).name}", tuple(items))


def tokenised(workload: Workload, llm: Any) -> Workload:
    """With the token ids of prompts that are given as text or messages."""
    if all(item.prompt is None for item in workload.items):
        return workload
    items = []
    for item in workload.items:
        ids = tuple(llm._prompt(item.prompt)[1])
        items.append(replace(item, prompt=None, token_ids=ids, prompt_tokens=len(ids)))
    return replace(workload, items=tuple(items))


def from_access_log(path: str | Path) -> Workload:
    """The lengths in an audit log of `qwen-fast serve --audit-log`, and how many requests ran at once. Its texts are not
    needed and not used: prompts are made up, so that a recorded hit of the prefix cache is computed here; a note says how
    much that was. Only requests that ended well count. ValueError names the line."""
    items, left_out, cached, spans = [], 0, 0, []
    for number, entry in _lines(path):
        if not isinstance(entry, dict) or not {"prompt_tokens", "completion_tokens", "outcome"} <= set(entry):
            raise ValueError(
                f"{path}:{number}: no record of an audit log: prompt_tokens, completion_tokens or outcome is missing"
            )
        counts = [entry["prompt_tokens"], entry["completion_tokens"], entry.get("sequences") or 1]
        if not all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts):
            raise ValueError(f"{path}:{number}: token counts must be integers of at least 0, got {counts}")
        if entry["outcome"] != "ok" or not counts[0] or not counts[1]:
            left_out += 1
            continue
        sequences = max(1, counts[2])
        items += [Item(counts[0], max(1, counts[1] // sequences))] * sequences
        cached += entry.get("cached_tokens") or 0
        if isinstance(entry.get("time"), (int, float)) and isinstance(entry.get("seconds"), (int, float)):
            spans.append((float(entry["time"]), float(entry["seconds"]) * sequences, float(entry["seconds"])))
    if not items:
        raise ValueError(f"{path}: no request in it ended well with at least one output token ({left_out} others)")
    notes = [f"lengths of {len(items)} recorded requests; the prompts are made up"]
    if left_out:
        notes.append(f"{left_out} record{'s' if left_out > 1 else ''} left out: failed, cancelled or without tokens")
    if cached:
        share = cached / sum(item.prompt_tokens for item in items)
        notes.append(
            f"{100 * share:.0f} % of the recorded prompt tokens came from the prefix cache; here all are computed"
        )
    users = None
    if spans:
        began, ended = min(at for at, _, _ in spans), max(at + seconds for at, _, seconds in spans)
        users = max(1, round(sum(work for _, work, _ in spans) / (ended - began))) if ended > began else 1
    return Workload("log", f"access log {Path(path).name}", tuple(items), tuple(notes), users=users)


def _lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if number > MAX_ITEMS:
                raise ValueError(f"{path}: more than {MAX_ITEMS:,} lines")
            if not text.strip():
                continue
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
