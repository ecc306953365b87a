"""Judges the runs that tools/gpu_check.sh makes, by their metrics.jsonl. Needs nothing but Python.

    gpu_check.py same CPU/metrics.jsonl GPU/metrics.jsonl   the two runs have the same losses, in fp32
    gpu_check.py close ONE/metrics.jsonl OTHER/metrics.jsonl    the same but for rounding to bf16
    gpu_check.py falls RUN/metrics.jsonl                    the loss of a run is finite and falls

Prints one line, and exits with 0 if it is so, else with 1.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

# The initial weights, the data and its order are the same, so fp32 losses differ by the order of sums alone.
# Two instruction sets of one CPU differ by 6e-7 at the third step; a GPU's kernels sum in yet another order.
# TF32 or bf16 where fp32 was asked for, or a wrong kernel, show as 1e-4 and more.
TOLERANCE = 1e-5

# bf16 has 8 bits, one part in 256; two kernels round different intermediates, and means over labels even it out.
BF16_TOLERANCE = 1e-2


def losses(path: Path) -> list[float]:
    """The loss of each step of a run.

    Raises:
        ValueError: the file is missing or has no step.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: the run wrote no metrics")
    values = [float(json.loads(line)["loss"]) for line in path.read_text().splitlines()]
    if not values:
        raise ValueError(f"{path} has no step")
    return values


def same(reference: list[float], found: list[float], tolerance: float = TOLERANCE) -> tuple[bool, str]:
    """Whether two runs have the same losses, and how far they are apart."""
    if len(reference) != len(found):
        return False, f"{len(reference)} steps against {len(found)}"
    differences = [abs(b / a - 1) for a, b in zip(reference, found, strict=True)]
    listed = ", ".join(f"{d:.1e}" for d in differences)
    close = all(d <= tolerance for d in differences)  # false for NaN
    return close, f"relative differences of the loss {listed}; allowed {tolerance:.0e}"


def falls(found: list[float]) -> tuple[bool, str]:
    """Whether a loss is finite and its last fifth is below its first."""
    if not all(math.isfinite(loss) for loss in found):
        return False, "a loss is not finite"
    part = max(len(found) // 5, 1)
    first, last = statistics.mean(found[:part]), statistics.mean(found[-part:])
    return last < first, f"loss {first:.3f} at the start, {last:.3f} at the end of {len(found)} steps"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["same", "close", "falls"])
    parser.add_argument("metrics", type=Path, nargs="+", help="metrics.jsonl of the run, else of both")
    options = parser.parse_args()
    wanted = 1 if options.question == "falls" else 2
    if len(options.metrics) != wanted:
        parser.error(f"{options.question} takes {wanted} metrics.jsonl")
    try:
        runs = [losses(path) for path in options.metrics]
        tolerance = BF16_TOLERANCE if options.question == "close" else TOLERANCE
        holds, text = falls(runs[0]) if options.question == "falls" else same(runs[0], runs[1], tolerance)
    except ValueError as error:
        holds, text = False, str(error)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
