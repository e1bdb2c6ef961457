"""Are 4-bit linear layers faster than 16-bit ones?

The four linear layers of a layer of the 7B and of the 0.5B shape, 1 to 512 tokens: ours in 4 bits, 8 bits and bf16, and cuBLAS's in
bf16, each with cold weights. Ours are timed by the kernels' own test (tests/kernels/test_linear_wgmma.cu --layers), after
its checks, with the kernel that the engine would take; gate_up includes silu(gate) * up. cuBLAS is asked through
torch in every way that it offers (weights by rows or by columns, from the left or from the right, cuBLAS or cuBLASLt, and a
matrix-vector product for one token), and the fastest counts. Both run from a CUDA graph that reads more than 200 MB of
different weights, so that neither launches nor the L2 cache count.

The figure: over the four linear layers, the sum of the faster of our bf16 and cuBLAS, by our 4 bits; and its worst
over all token counts and over those up to 16.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import HERE, save
from gpu_common import gpu_environment, parser

RUNNER = HERE.parent / "tests" / "kernels" / "run.py"
COLD_BYTES = 220_000_000
FEW_TOKENS = 16
LEAST, LEAST_FEW = 0.95, 2.0  # what is wanted of the figure: at every size, and at few tokens
Case = tuple[str, str, int, int, int]  # model, linear, n, k, tokens


def parse_layers(text: str) -> dict[int, dict[Case, float]]:
    """Microseconds by bits and case, from the lines "layer MODEL LINEAR N K BITS TOKENS US SPLITS"."""
    times: dict[int, dict[Case, float]] = {}
    for line in text.splitlines():
        if line.startswith("layer "):
            _, model, linear, n, k, bits, tokens, us, _ = line.split()
            times.setdefault(int(bits), {})[model, linear, int(n), int(k), int(tokens)] = float(us)
    if set(times) != {4, 8, 16} or len({frozenset(cases) for cases in times.values()}) != 1:
        raise ValueError(f"not a table of 4, 8 and 16 bits: {text[-2000:]}")
    return times


def our_times(program: Path | None) -> dict[int, dict[Case, float]]:
    if program is None:
        command = [sys.executable, str(RUNNER), "linear_wgmma", "--build-only"]
        program = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    done = subprocess.run(
        [str(program.absolute()), "--layers"], capture_output=True, text=True, check=False, timeout=500
    )
    if done.returncode != 0:
        raise RuntimeError(f"{program} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return parse_layers(done.stdout)


# -- cuBLAS ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Way:
    """One way to multiply: call(i) gives (tokens, n) with copy i of the weights; weight is copy 0 as (k, n)."""

    name: str
    call: Callable[[int], Any]
    x: Any
    weight: Any

    def check(self) -> None:
        """The first columns of the result against float32."""
        got = self.call(0)[:, :64].float()
        wanted = self.x.float() @ self.weight[:, :64].float()
        error = ((got - wanted).norm() / wanted.norm()).item()
        if not error < 1e-2:
            raise RuntimeError(f"{self.name}, {tuple(self.weight.shape)}: off by {error}")


def ways_to_multiply(torch: Any, n: int, k: int, tokens: int, pool: Any) -> Iterator[Way]:
    """Each chooses its library before it is handed out, so they are to be used one after the other."""
    copies = pool.numel() // (n * k)
    x = torch.randn(tokens, k, device=pool.device).to(pool.dtype)
    rows, columns = pool[: copies * n * k].view(copies, n, k), pool[: copies * n * k].view(copies, k, n)
    out, turned = (torch.empty(size, device=pool.device, dtype=pool.dtype) for size in ((tokens, n), (n, tokens)))

    def by_rows(i: int) -> Any:
        return torch.mm(x, rows[i % copies].t(), out=out)

    def by_columns(i: int) -> Any:
        return torch.mm(x, columns[i % copies], out=out)

    def left_by_rows(i: int) -> Any:
        return torch.mm(rows[i % copies], x.t(), out=turned).t()

    def left_by_columns(i: int) -> Any:
        return torch.mm(columns[i % copies].t(), x.t(), out=turned).t()

    def vector(i: int) -> Any:
        return torch.mv(rows[i % copies], x[0], out=out[0])[None]

    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        yield Way(f"{library}, x W^T", by_rows, x, rows[0].t())
        yield Way(f"{library}, x W", by_columns, x, columns[0])
        yield Way(f"{library}, W x^T", left_by_rows, x, rows[0].t())
        yield Way(f"{library}, W^T x^T", left_by_columns, x, columns[0])
        if tokens == 1:
            yield Way(f"{library}, vector", vector, x, rows[0].t())


def time_us(torch: Any, call: Callable[[int], Any], calls: int, repeats: int) -> float:
    """Median microseconds of one of `calls` calls in a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for i in range(repeats + 2):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 2:
            times.append(1e3 * start.elapsed_time(stop) / calls)
    return statistics.median(times)


def cublas_times(cases: list[Case], repeats: int) -> dict[Case, tuple[float, str]]:
    """The fastest way of each case."""
    import torch

    square = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    for _ in range(100):  # the clocks rise
        square @ square
    found = {}
    for n, k in dict.fromkeys((n, k) for _, _, n, k, _ in cases):
        copies = max(2, COLD_BYTES // (2 * n * k) + 1)
        pool = (torch.randn(copies * n * k, device="cuda") * k**-0.5).to(torch.bfloat16)
        for case in [one for one in cases if one[2:4] == (n, k)]:
            tokens = case[4]
            estimate_us = max(2 * n * k / 3e6, 2 * n * k * tokens / 5e8) + 3
            calls = max(copies, 3, min(256, int(1500 / estimate_us)))
            ways = []
            for way in ways_to_multiply(torch, n, k, tokens, pool):
                way.check()
                ways.append((time_us(torch, way.call, calls, repeats), way.name))
            found[case] = min(ways)
        del pool
    return found


# -- the figure ------------------------------------------------------------------------------------------------------


def compare(ours: dict[int, dict[Case, float]], cublas: dict[Case, tuple[float, str]]) -> list[dict[str, Any]]:
    """A row for each model and token count: microseconds of the four linears and the ratio to ours in 4 and 8 bits."""
    rows = []
    for model, tokens in dict.fromkeys((case[0], case[4]) for case in cublas):
        cases = [case for case in cublas if (case[0], case[4]) == (model, tokens)]
        sums = {bits: sum(times[case] for case in cases) for bits, times in ours.items()}
        faster = sum(min(ours[16][case], cublas[case][0]) for case in cases)
        rows.append(
            {
                "model": model,
                "tokens": tokens,
                "us": {f"{bits} bits": us for bits, us in sums.items()} | {"cublas": sum(cublas[c][0] for c in cases)},
                "faster_16_bits_us": faster,
                "ratio_4_bits": faster / sums[4],
                "ratio_8_bits": faster / sums[8],
                "linears": [
                    {
                        "linear": case[1],
                        "n": case[2],
                        "k": case[3],
                        "us": {str(bits): times[case] for bits, times in ours.items()},
                        "cublas_us": cublas[case][0],
                        "cublas_way": cublas[case][1],
                    }
                    for case in cases
                ],
            }
        )
    return rows


def worst(rows: list[dict[str, Any]], model: str) -> dict[str, Any]:
    """The least ratio over all token counts and over the few."""
    ratios = {row["tokens"]: row["ratio_4_bits"] for row in rows if row["model"] == model}
    least = min(ratios.values())
    few = min(ratio for tokens, ratio in ratios.items() if tokens <= FEW_TOKENS)
    return {"model": model, "worst": least, "worst_few": few, "met": least >= LEAST and few >= LEAST_FEW}


def print_rows(rows: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        print(f"\n{model}: us of a layer's four linears; cold weights")
        print("  tokens   4 bits   8 bits  16 bits   cuBLAS   faster 16 / 4   / 8   each: 4 bits, 16 bits, cuBLAS")
        for row in [one for one in rows if one["model"] == model]:
            us = row["us"]
            each = "; ".join(
                f"{one['linear']} {one['us']['4']:.1f} {one['us']['16']:.1f} {one['cublas_us']:.1f}"
                for one in row["linears"]
            )
            print(
                f"  {row['tokens']:6} {us['4 bits']:8.1f} {us['8 bits']:8.1f} {us['16 bits']:8.1f} {us['cublas']:8.1f} "
                f"{row['ratio_4_bits']:15.2f} {row['ratio_8_bits']:5.2f}   {each}"
            )
        found = worst(rows, model)
        print(
            f"  worst ratio of 4 bits {found['worst']:.3f} (wanted {LEAST}), up to {FEW_TOKENS} tokens "
            f"{found['worst_few']:.3f} (wanted {LEAST_FEW}): {'met' if found['met'] else 'MISSED'}"
        )


def main() -> None:
    arguments: argparse.ArgumentParser = parser(__doc__)
    arguments.add_argument("--program", type=Path, help="the kernels' test test_linear_wgmma, as built before")
    args = arguments.parse_args()
    ours = our_times(args.program)
    cases = [case for case in ours[4] if args.only in (None, case[0])]
    rows = compare(ours, cublas_times(cases, args.repeats))
    print_rows(rows)
    models = dict.fromkeys(row["model"] for row in rows)
    figures = [worst(rows, model) for model in models]
    save("gpu-linears", rows, args.save, args.results, **gpu_environment(args), figures=figures)


if __name__ == "__main__":
    main()
