"""Peak memory of a rank in a whole training step, against the number of ranks that share the row (the context size).

    python tools/bench/context_memory.py
    python tools/bench/context_memory.py --tokens 65536 --contexts 8
    python tools/bench/context_memory.py --model internvl26b --tokens 131072 model.language.num_layers=4

Starts as many processes as there are ranks, once for each context size, on GPUs where there are any. Every one
takes the same step from the same weights on the same row: frames and text, forward, backward and optimizer. Loss and
gradient norm have to be the same within rounding, or the tool stops. A step on a short row goes before it, so that
the optimizer's state is there. Memory is that of tensors: on a GPU as PyTorch's allocator counts it, on a CPU as the
profiler sees each allocation and freeing, also within operators.
"""

import argparse
import json
import platform
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megamed.utils import UserError
from megamed.utils.command import positive, run_ranks

RANK = Path(__file__).resolve().with_name("context_memory_rank.py")
# Of loss and gradient norm, relative. What other orders of sums make of them: fp32 has 1.2e-7, bf16 4e-3.
TOLERANCE = {"torch.float32": 1e-5, "torch.bfloat16": 1e-2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for launch/pretrain.py")
    parser.add_argument("--model", default="internvl_tiny", help="a name in conf/model (default: internvl_tiny)")
    parser.add_argument("--tokens", type=positive, default=32768, help="of the row (default: 32768)")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1, 2, 4, 8], metavar="N",
                        help="context sizes, the first of which the others are compared with (default: 1 2 4 8)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--ring", type=positive, metavar="R",
                        help="at most so many ranks in the ring; the others trade heads")
    either.add_argument("--ulysses", type=positive, default=1, metavar="U",
                        help="at most so many ranks that trade heads; the others are in the ring (default: 1)")
    parser.add_argument("--documents", type=positive, default=1, metavar="M",
                        help="of the row, 1 : 2 : ... : M as long (default: 1)")
    parser.add_argument("--markdown", action="store_true", help="print the result as rows of docs/performance.md")
    return parser.parse_args()


def split(context: int, args: argparse.Namespace) -> tuple[int, int]:
    """(ring, ulysses) of a context size.

    Raises:
        UserError: it does not divide.
    """
    inner = min(args.ring or args.ulysses, context)
    if context % inner:
        name, value = ("ring", args.ring) if args.ring else ("ulysses", args.ulysses)
        raise UserError(f"--{name} {value} does not divide --contexts {context}")
    return (inner, context // inner) if args.ring else (context // inner, inner)


def measure(ring: int, ulysses: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `context_memory_rank.py` measures on ring x ulysses ranks.

    Raises:
        UserError: a process failed; what it said is on the screen.
    """
    print(f"ring {ring} x ulysses {ulysses}: starting {ring * ulysses} process(es)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        arguments = [
            *("--out", str(out), "--model", args.model, "--tokens", str(args.tokens)),
            *("--documents", str(args.documents), "--ring", str(ring), "--ulysses", str(ulysses), *args.overrides),
        ]
        # The profiler announces itself, and warns of memory that was there before it.
        quiet = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        if code := run_ranks(RANK, ring * ulysses, arguments, ("-W", "ignore"), quiet):
            raise UserError(f"the step on ring {ring} x ulysses {ulysses} failed with code {code}")
        measured = json.loads(out.read_text())
    print(f"    the step took {measured['seconds']:.0f} s", file=sys.stderr)
    return measured


def need_same(first: dict[str, Any], other: dict[str, Any]) -> None:
    """Stop where two steps were not the same."""
    for name in ("loss", "grad_norm"):
        if not abs(other[name] / first[name] - 1) <= TOLERANCE[other["dtype"]]:
            raise RuntimeError(f"{name} is {other[name]} on ring {other['ring']} x ulysses {other['ulysses']} and "
                               f"{first[name]} on {first['ring']} x {first['ulysses']}: not the same step")


def table(measured: list[dict[str, Any]], tokens: int, markdown: bool) -> str:
    """A row for each context size; memory is the largest of its ranks."""
    rows = [["context", "ring x ulysses", "tokens a rank", "loss", "gradient norm", "peak a rank, MiB", "share",
             "kept, MiB", "in the step, MiB"]]  # fmt: skip
    for one in measured:
        ranks, peak = one["ring"] * one["ulysses"], max(one["peak"])
        step = max(p - k for p, k in zip(one["peak"], one["kept"], strict=True))
        rows.append([
            str(ranks), f"{one['ring']} x {one['ulysses']}", str(tokens // ranks), f"{one['loss']:.7f}",
            f"{one['grad_norm']:.7f}", f"{peak / 2**20:.1f}", f"{peak / max(measured[0]['peak']):.3f}",
            f"{max(one['kept']) / 2**20:.1f}", f"{step / 2**20:.1f}",
        ])  # fmt: skip
    if markdown:
        header, *others = (f"| {' | '.join(row)} |" for row in rows)
        return "\n".join([header, "|---" * len(rows[0]) + "|", *others])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def main(args: argparse.Namespace) -> None:
    import torch

    splits = [split(context, args) for context in args.contexts]
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        fitting = [(ring, ulysses) for ring, ulysses in splits if ring * ulysses <= num_gpus]
        if len(fitting) < len(splits):
            print(f"context sizes above {num_gpus}, the number of GPUs, are left out", file=sys.stderr)
        if not fitting:
            raise UserError(f"there are {num_gpus} GPUs; choose smaller --contexts")
        splits = fitting
    measured = []
    for ring, ulysses in splits:
        measured.append(measure(ring, ulysses, args))
        need_same(measured[0], measured[-1])
    one = measured[0]
    print(f"{one['device']}; Python {platform.python_version()}, torch {version('torch')}, "
          f"megatron-core {version('megatron-core')}")
    print(f"{args.model}, {one['dtype'].removeprefix('torch.')}; a row of {args.tokens} tokens: {args.documents} "
          f"document(s), {one['frames']} frames")
    print(table(measured, args.tokens, args.markdown))


if __name__ == "__main__":
    parsed = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main(parsed)
    except UserError as error:
        sys.exit(f"context_memory: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
