"""How long from starting a process to the first token on the terminal, on a GPU?

`qwen-fast generate --device cuda` is started as a person starts it, with its output in a pipe; the clock stops at the
first byte of text. Cases: the packaged demo, read from its files, and the 0.5B and the 7B shape in 4 bits (random codes
are made in place of being read, and the tokenizer is the demo's, which is smaller than the real one). The command's own
figures stand beside it: its load, and the age of the process at the first token.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cold_start import PROMPT, first_byte_s
from common import demo_dir, dummy, save
from gpu_common import SHAPES, check_against_cpu, gpu_environment, parser

COMMON = ["--device", "cuda", "--max-tokens", "16", "--temperature", "0"]


def own_figures(options: list[str]) -> dict[str, float]:
    """What --stats says of one more start."""
    command = [sys.executable, "-m", "qwen_fast", "generate", PROMPT, *options, "--stats"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr
    figures = re.search(r"loaded in ([\d.]+) s · first token ([\d.]+) s after process start", said)
    return {"load_s": float(figures[1]), "first_token_s": float(figures[2])} if figures else {}


def main() -> None:
    args = parser(__doc__).parse_args()
    rows: list[dict[str, Any]] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        cases = {"demo": ["--model", str(demo_dir()), *COMMON]}
        for name, shape in SHAPES.items():
            if not args.skip_check:
                checks[name] = check_against_cpu(name, Path(directory), {"quantization": "w4"})
            model = dummy(Path(directory) / name, shape)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(demo_dir() / file, model / file)
            made = ["--load-format", "dummy", "--quantization", "w4", "--max-model-len", "2048"]
            cases[f"{name} shape"] = ["--model", str(model), *made, *COMMON]
        for name, options in cases.items():
            if args.only not in (None, name.removesuffix(" shape")):
                continue
            starts = [first_byte_s(options) for _ in range(args.repeats)]
            texts = {text for _, text in starts}
            if len(texts) != 1:
                raise RuntimeError(f"{name}: greedy runs gave different texts: {texts}")
            times = [seconds for seconds, _ in starts]
            own = own_figures(options)
            row = {"case": name, "seconds_first": times[0], "seconds_best": min(times), "seconds_worst": max(times)}
            rows.append({**row, "runs": len(times), "command_says": own})
            print(
                f"{name:12} first token after {min(times):.2f} s (first start {times[0]:.2f} s, worst of {len(times)} "
                f"{max(times):.2f} s); the command says {own}: {texts.pop()[:50]!r}",
                flush=True,
            )
    save("gpu-startup", rows, args.save, args.results, **gpu_environment(args), checks=checks)


if __name__ == "__main__":
    main()
