"""How long from starting a process to the first token on the terminal, on a GPU?

`qwen-fast generate --device cuda` is started as a person starts it, with its output in a pipe; the clock stops at the
first byte of text. Cases: the packaged demo, read from its files; the 0.5B and the 7B shape in 4 bits with random codes
that are made in place of being read; and both shapes read from AWQ files of the real names and sizes with made-up
content (awq_files.py), which lie in the page cache. The tokenizer is the demo's, which is smaller than the real one.
The command's own figures stand beside it: its load, and the age of the process at the first token. The median of the
starts from files is set against what is wanted; the exit status is 1 where it is more.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from awq_files import read_files, write_awq
from cold_start import PROMPT, first_byte_s
from common import demo_dir, dummy, save
from gpu_common import SHAPES, check_against_cpu, gpu_environment, parser

COMMON = ["--device", "cuda", "--max-tokens", "16", "--temperature", "0"]
WANTED_S = {"0.5B files": 2.5, "7B files": 5.0}


def own_figures(options: list[str]) -> dict[str, float]:
    """What --stats says of one more start."""
    command = [sys.executable, "-m", "qwen_fast", "generate", PROMPT, *options, "--stats"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    figures = re.search(r"loaded in ([\d.]+) s · first token ([\d.]+) s after process start", said)
    return {"load_s": float(figures[1]), "first_token_s": float(figures[2])} if figures else {}


def measure(name: str, options: list[str], repeats: int) -> dict[str, Any]:
    starts = [first_byte_s(options) for _ in range(repeats)]
    texts = {text for _, text in starts}
    if len(texts) != 1:
        raise RuntimeError(f"{name}: greedy runs gave different texts: {texts}")
    times = [seconds for seconds, _ in starts]
    own, median = own_figures(options), statistics.median(times)
    wanted = WANTED_S.get(name)
    verdict = "" if wanted is None else f", wanted {wanted} s: {'met' if median < wanted else 'MISSED'}"
    print(
        f"{name:12} first token after {median:.2f} s, the median of {len(times)} (first start {times[0]:.2f} s, best "
        f"{min(times):.2f} s, worst {max(times):.2f} s){verdict}; the command says {own}: {texts.pop()[:50]!r}",
        flush=True,
    )
    return {
        "case": name,
        "seconds_first": times[0],
        "seconds_best": min(times),
        "seconds_median": median,
        "seconds_worst": max(times),
        "seconds_wanted": wanted,
        "runs": len(times),
        "command_says": own,
    }


def add_tokenizer(model: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_dir() / file, model / file)


def from_files(name: str, parent: Path, repeats: int) -> dict[str, Any]:
    model = parent / f"{name}-files"
    begin = time.perf_counter()
    size = write_awq(model, SHAPES[name])
    add_tokenizer(model)
    written = time.perf_counter() - begin
    read_files(model)
    print(f"{name}: {size / 1e9:.2f} GB of files, written in {written:.1f} s", flush=True)
    try:
        row = measure(f"{name} files", ["--model", str(model), "--max-model-len", "2048", *COMMON], repeats)
    finally:
        shutil.rmtree(model)
    return {**row, "file_bytes": size}


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.set_defaults(repeats=3)
    arguments.add_argument(
        "--files-in", type=Path, help="where the files are written (default: the temporary directory)"
    )
    arguments.add_argument("--no-files", action="store_true", help="leave out the starts from files of the shapes")
    args = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.files_in) as directory:
        if args.only is None:
            rows.append(measure("demo", ["--model", str(demo_dir()), *COMMON], args.repeats))
        for name, shape in SHAPES.items():
            if args.only not in (None, name):
                continue
            if not args.skip_check:
                checks[name] = check_against_cpu(name, Path(directory), {"quantization": "w4"})
            model = dummy(Path(directory) / name, shape)
            add_tokenizer(model)
            made = ["--load-format", "dummy", "--quantization", "w4", "--max-model-len", "2048"]
            rows.append(measure(f"{name} shape", ["--model", str(model), *made, *COMMON], args.repeats))
            if not args.no_files:
                rows.append(from_files(name, Path(directory), args.repeats))
    save("gpu-startup", rows, args.save, args.results, **gpu_environment(args), checks=checks)
    missed = [row["case"] for row in rows if row["seconds_wanted"] and row["seconds_median"] >= row["seconds_wanted"]]
    if missed:
        sys.exit(f"slower than wanted: {', '.join(missed)}")


if __name__ == "__main__":
    main()
