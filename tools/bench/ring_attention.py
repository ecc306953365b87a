"""Time ring attention against one fused call over the whole sequence, with the same block kernel.

    python tools/bench/ring_attention.py                        one process: the blocks of all ranks
    torchrun --nproc-per-node 8 tools/bench/ring_attention.py   the real ring, with its communication

One process computes the blocks of every rank of a zigzag ring, one after another, merged as each rank would;
torchrun's processes are the ring, also split into ring x ulysses. All sides take turns, and the tool stops if
their outputs or gradients differ. FLOPs are counted by formula: half of full attention, and 2.5 times the forward
pass's for the backward pass. A ratio is a rank's throughput over the fused call's. Where a shape's heads do not fit
in memory or take longer than they tell, some are measured, and the table says how many.

On a CPU it is small and prints ratios alone, those of one process by processor time.
"""

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megamed.utils.command import positive

if TYPE_CHECKING:
    import torch
    from ring_blocks import Heads
    from ring_times import Case

    from megamed.ops.kernels import BlockKernel

SHAPES = {"llama8b": (32, 8, 128), "internlm20b": (48, 8, 128), "small": (4, 2, 64)}
ON_GPU: dict[str, Any] = {"shapes": ["llama8b", "internlm20b"], "tokens": [8192, 32768, 131072]}
ON_CPU: dict[str, Any] = {"shapes": ["small"], "tokens": [512, 2048]}
# Of forward and backward pass together: seconds on a GPU, by when more heads tell nothing more.
MOST_FLOPS = 4e15
# Of the free memory.
MEMORY_SHARE = 0.9


def shape(text: str) -> tuple[str, tuple[int, int, int]]:
    """A name in `SHAPES`, or query heads:key/value heads:width."""
    if text in SHAPES:
        return text, SHAPES[text]
    num_heads, num_kv_heads, head_dim = map(int, text.split(":"))
    if min(num_heads, num_kv_heads, head_dim) < 1 or num_heads % num_kv_heads:
        raise ValueError(text)
    return "own", (num_heads, num_kv_heads, head_dim)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="SHAPE",
                        help=f"{', '.join(SHAPES)}, or query heads:key/value heads:width, as 32:8:128 "
                             "(default: llama8b internlm20b; on a CPU: small)")
    parser.add_argument("--tokens", type=positive, nargs="+", metavar="T",
                        help="tokens a shard (default: 8192 32768 131072; on a CPU: 512 2048)")
    parser.add_argument("--shards", type=positive, metavar="R",
                        help="ranks that one process plays (default: 8); torchrun's processes count themselves")
    parser.add_argument("--ulysses", type=positive, nargs="+", metavar="U",
                        help="with torchrun: ranks that trade heads, the ring has the others (default: every number "
                             "that divides the processes and the key/value heads)")
    parser.add_argument("--kernels", nargs="+", metavar="KERNEL",
                        help="block kernels to compare, such as cudnn flash_attn torch_flash (default: the one that "
                             "attention.kernel=auto takes)")
    parser.add_argument("--documents", type=positive, nargs="+", default=[1], metavar="M",
                        help="documents of the packed row, 1 : 2 : ... : M as long (default: 1)")
    parser.add_argument("--repetitions", type=positive, default=5, help="timed turns (default: 5)")
    parser.add_argument("--markdown", action="store_true", help="print the result as rows of docs/performance.md")
    return parser.parse_args()


def free_bytes() -> int:
    """Memory that tensors can take."""
    import psutil
    import torch

    from megamed.runtime import device_type

    if device_type() == "cpu":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def measured_heads(whole: "Heads", length: int, num_ranks: int, itemsize: int, multiple: int) -> "Heads":
    """The largest part of the heads, in whole groups, that fits in memory and takes no more than `MOST_FLOPS`.

    Args:
        whole: the heads of the shape.
        length: tokens of the row.
        num_ranks: that share it.
        itemsize: bytes of a number.
        multiple: the number of key/value heads stays a multiple of it.

    Raises:
        UserError: the smallest part does not fit.
    """
    from ring_blocks import BACKWARD, document_bounds, forward_flops, needed_bytes

    from megamed.utils import UserError

    room, bounds = MEMORY_SHARE * free_bytes(), document_bounds(1, length)
    counts = [n for n in range(multiple, whole.num_kv_heads + 1, multiple) if whole.num_kv_heads % n == 0]
    parts = [whole.of_groups(n) for n in counts]
    fitting = [part for part in parts if needed_bytes(length, num_ranks, part, itemsize) <= room]
    if not fitting:
        needed = needed_bytes(length, num_ranks, parts[0], itemsize)
        raise UserError(f"{length} tokens take {needed / 2**30:.1f} GiB, and there are {room / 2**30:.1f}; "
                        "choose fewer --tokens", everywhere=True)
    quick = [part for part in fitting if (1 + BACKWARD) * forward_flops(bounds, part) <= MOST_FLOPS]
    return quick[-1] if quick else fitting[0]


def named_kernels(names: list[str], dtype: "torch.dtype", head_dim: int) -> "list[BlockKernel]":
    """Those of the block kernels that can run here. Says of each other one why it cannot.

    Raises:
        UserError: none of them can, or there is none of that name.
    """
    from megamed.ops.kernels import KERNELS
    from megamed.runtime import current_device, global_rank
    from megamed.utils import UserError

    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise UserError(f"--kernels {unknown[0]} is none of {', '.join(KERNELS)}", everywhere=True)
    reasons = {name: KERNELS[name].unavailable(current_device(), dtype, head_dim) for name in names}
    for name, reason in reasons.items():
        if reason is not None and global_rank() == 0:
            print(f"left out: {name} {reason}", file=sys.stderr)
    found = [KERNELS[name] for name, reason in reasons.items() if reason is None]
    if not found:
        raise UserError("no kernel of --kernels can run here", everywhere=True)
    return found


def cases(args: argparse.Namespace, num_ranks: int, multiple: Callable[[int], int]) -> "Iterator[Case]":
    """Everything that the options ask for.

    Args:
        args: the options.
        num_ranks: that share the row.
        multiple: what the measured key/value heads have to be a multiple of, by the number of all.
    """
    from ring_blocks import Heads
    from ring_times import Case

    from megamed import runtime
    from megamed.ops.kernels import pick_kernel

    default, dtype = (ON_GPU if runtime.device_type() == "cuda" else ON_CPU), runtime.default_dtype()
    for name, sizes in args.shapes or map(shape, default["shapes"]):
        whole = Heads(*sizes)
        named = named_kernels(args.kernels, dtype, whole.head_dim) if args.kernels else None
        for tokens in args.tokens or default["tokens"]:
            length, step = tokens * num_ranks, multiple(whole.num_kv_heads)
            for documents in args.documents:
                for kernel in named or [pick_kernel(runtime.current_device(), dtype, whole.head_dim, documents)]:
                    heads = measured_heads(whole, length, num_ranks, dtype.itemsize, step)
                    yield Case(name, whole, heads, kernel, documents, tokens, num_ranks)


def splits(asked: list[int] | None, num_ranks: int, num_kv_heads: int) -> list[int]:
    """Ulysses ranks of each split to measure.

    Raises:
        UserError: one does not divide.
    """
    from megamed.utils import UserError

    both = math.gcd(num_ranks, num_kv_heads)
    for ulysses in asked or []:
        if both % ulysses:
            raise UserError(f"--ulysses {ulysses} does not divide {num_ranks} processes and {num_kv_heads} "
                            "key/value heads", everywhere=True)
    return asked or [ulysses for ulysses in range(1, both + 1) if both % ulysses == 0]


def table(rows: list[dict[str, str]], markdown: bool) -> str:
    """Rows that have the same columns, as Markdown or aligned."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    if markdown:
        header, *others = (f"| {' | '.join(line)} |" for line in lines)
        return "\n".join([header, "|---" * len(rows[0]) + "|", *others])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (map(str.ljust, line, widths) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def environment() -> str:
    """Hardware and versions, in a line."""
    import torch

    from megamed.runtime import device_type, world_size

    if device_type() == "cuda":
        machine = f"{world_size()} x {torch.cuda.get_device_name()}"
    else:
        machine = f"{os.cpu_count()}-core {platform.machine()} machine, one thread a process"
    return f"{machine}; Python {platform.python_version()}, torch {torch.__version__}"


def main(args: argparse.Namespace) -> None:
    import torch
    from ring_times import measure_blocks, measure_ranks

    from megamed import runtime
    from megamed.utils import UserError, log

    torch.set_num_threads(1)
    log.setup(runtime.global_rank(), level="WARNING")
    runtime.start()
    num_ranks = runtime.world_size()
    rows: list[dict[str, str]] = []
    if num_ranks == 1:
        if args.ulysses:
            raise UserError("--ulysses is for several processes; start them with torchrun")
        for case in cases(args, args.shards or 8, lambda num_kv_heads: 1):
            rows.append(measure_blocks(case, args.repetitions))
    else:
        if args.shards:
            raise UserError(f"--shards is for one process; the {num_ranks} of torchrun have one each", everywhere=True)
        for case in cases(args, num_ranks, lambda count: math.lcm(*splits(args.ulysses, num_ranks, count))):
            rows += measure_ranks(case, splits(args.ulysses, num_ranks, case.whole.num_kv_heads), args.repetitions)
    if runtime.global_rank() == 0:
        print(environment())
        print(table(rows, args.markdown))


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    from megamed.runtime.process import run

    run(lambda: main(parsed))
