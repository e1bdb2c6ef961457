"""How fast is each kernel alone? The tables of tests/kernels/run.py --bench, with the GPU's limits above them.

Every program checks its kernel against a reference on the CPU first and prints nothing but the failure if that fails.
The tables give microseconds, GB/s or TFLOP/s, and shares of fixed figures; what was measured here stands in the result.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common import HERE, save
from gpu_common import Limits, gpu_environment, parser

RUNNER = HERE.parent / "tests" / "kernels" / "run.py"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("names", nargs="*", help="kernel tests by name; all where none is given")
    arguments.add_argument("--programs", type=Path, help="a folder of programs built before")
    arguments.add_argument("--sm80", action="store_true", help="the code path of GPUs before Hopper")
    args = arguments.parse_args()
    limits = Limits(args)
    options = ["--bench"] + ["--sm80"] * args.sm80
    if args.programs:
        options += ["--programs", str(args.programs)]
        args.names = args.names or sorted(path.name for path in args.programs.glob("test_*"))
    done = subprocess.run(
        [sys.executable, str(RUNNER), *args.names, *options], capture_output=True, text=True, check=False
    )
    print(done.stdout + done.stderr)
    rows = [{"line": line} for line in done.stdout.splitlines() if line.strip()]
    save("gpu-kernels", rows, args.save, args.results, **gpu_environment(args), limits=limits.said)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
