"""How long from starting a process to the first token on the terminal?

`qwen-fast generate` is started as a person starts it, with its output in a pipe; the clock stops at the first byte of
text. Cases: the packaged demo, and a dummy model of the 0.5B shape in 4 bits (random codes are made in place of being
read from files, and its tokenizer is the demo's, which is smaller than the real one).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import demo_dir, dummy_0_5b, parser, save

PROMPT = "Tell me a story about Nora the fox."


def first_byte_s(options: list[str]) -> tuple[float, str]:
    """Seconds to the first byte of output, and the beginning of the text."""
    command = [sys.executable, "-m", "qwen_fast", "generate", PROMPT, *options]
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - begin
        text = first + process.stdout.read()
        errors = process.stderr.read()
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{command} ended with {process.returncode}: {errors.decode('utf-8', 'replace')[-2000:]}")
    return seconds, text.decode("utf-8", "replace")


def main() -> None:
    args = parser(__doc__).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        dummy = dummy_0_5b(Path(directory))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_dir() / name, dummy / name)
        common = ["--max-tokens", "16", "--temperature", "0"]
        cases = {
            "demo": ["--model", str(demo_dir()), *common],
            "0.5B shape": [
                "--model", str(dummy), "--load-format", "dummy", "--quantization", "w4", "--max-model-len", "2048", *common
            ],
        }  # fmt: skip
        for name, options in cases.items():
            texts, times = set(), []
            for _ in range(args.repeats):
                seconds, text = first_byte_s(options)
                times.append(seconds)
                texts.add(text)
            if len(texts) != 1:
                raise RuntimeError(f"{name}: greedy runs gave different texts: {texts}")
            row = {"case": name, "seconds_best": min(times), "seconds_worst": max(times), "runs": len(times)}
            rows.append(row)
            print(
                f"{name:16} first token after {min(times):.2f} s (worst of {len(times)}: {max(times):.2f} s): {texts.pop()[:60]!r}"
            )
    save("cold-start", rows, args.save)


if __name__ == "__main__":
    main()
