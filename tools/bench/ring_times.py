"""Times a ring and one fused call over the same row, turn by turn, after it has seen that they compute the same.

Shapes: T tokens of a rank, N query heads, G key/value heads (G divides N), D head width.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ring_blocks import BACKWARD, Fused, Heads, Ring, Row, difference, document_bounds, forward_flops
from torch import Tensor
from tqdm import tqdm

from megamed import runtime
from megamed.ops.kernels import BlockKernel
from megamed.ops.ring_plan import plan_ring
from megamed.ops.ulysses import context_attention
from megamed.ops.zigzag import shard_order

# What rounding makes of other orders of sums: of the whole tensor, relative. bf16 has 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: of the shape.
        whole: its heads.
        heads: those that are measured, all or some.
        kernel: of both sides.
        num_documents: of the packed row.
        tokens: of a shard.
        num_ranks: R.
    """

    name: str
    whole: Heads
    heads: Heads
    kernel: BlockKernel
    num_documents: int
    tokens: int
    num_ranks: int

    def row(self) -> Row:
        """Tensors to measure with."""
        bounds = document_bounds(self.num_documents, self.tokens * self.num_ranks)
        return Row.draw(bounds, self.heads, runtime.default_dtype(), runtime.current_device())

    def columns(self) -> dict[str, str]:
        """The first columns of the table."""
        part, whole = self.heads, self.whole
        share = "" if part == whole else f" ({part.num_heads}:{part.num_kv_heads} measured)"
        return {
            "shape": self.name,
            "heads": f"{whole.num_heads}:{whole.num_kv_heads}:{whole.head_dim}{share}",
            "kernel": self.kernel.name,
            "documents": str(self.num_documents),
            "tokens a shard": str(self.tokens),
        }


@dataclass
class Times:
    """Seconds of one side, turn by turn."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float) -> None:
        """One more turn."""
        self.forward.append(forward)
        self.backward.append(backward)

    @property
    def both(self) -> list[float]:
        """Of forward and backward pass together."""
        return [f + b for f, b in zip(self.forward, self.backward, strict=True)]


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What the function returns, and its seconds.

    By the clock on the wall; in one process on a CPU, by processor time, which does not count what else runs.
    """
    clock = time.process_time if runtime.device_type() == "cpu" and runtime.world_size() == 1 else time.perf_counter
    runtime.synchronize()
    start = clock()
    result = function()
    runtime.synchronize()
    return result, clock() - start


def timed_together(function: Callable[[], Any]) -> float:
    """Seconds of the slowest process, when all call the function at the same time."""
    dist.barrier()
    seconds = torch.tensor(timed(function)[1], dtype=torch.float64, device=runtime.current_device())
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def measure_blocks(case: Case, repetitions: int) -> dict[str, str]:
    """One process: all ranks' blocks, one after another, in turns with the fused call and with the kernels alone.

    Returns:
        A row of the table, cell by column.
    """
    row = case.row()
    fused, ring = Fused(row, case.kernel), Ring(row, case.num_ranks, case.kernel)
    of_fused, of_ring, of_kernels = Times(), Times(), Times()
    of_ranks = [Times() for _ in range(case.num_ranks)]
    for counts in _turns(case, repetitions):
        seconds = timed(fused.forward)[1], timed(fused.backward)[1]
        if counts:
            of_fused.add(*seconds)
        ring.dkv_R2TGD.zero_()
        alone: list[tuple[float, float]] = []
        for rank, times in enumerate(of_ranks):
            (out, lse), forward = timed(partial(ring.forward, rank))
            dq, backward = timed(partial(ring.backward, rank, out, lse))
            if counts:
                times.add(forward, backward)
                alone.append((_alone(ring.forward_calls(rank)), _alone(ring.backward_calls(rank, out, lse))))
            else:
                order = ring.order_RT[rank]
                _need_same("the output", out, fused.out_SND[order])
                _need_same("dq", dq, fused.gradients[0][order])
        if counts:
            of_ring.add(sum(t.forward[-1] for t in of_ranks), sum(t.backward[-1] for t in of_ranks))
            of_kernels.add(*map(sum, zip(*alone, strict=True)))
        else:
            for i, name in enumerate(("dk", "dv")):
                _need_same(name, ring.dkv_R2TGD[:, i], fused.gradients[1 + i][ring.order_RT])
    slowest = max(statistics.median(times.both) for times in of_ranks)
    outside = [100 * (r / k - 1) for r, k in zip(of_ring.both, of_kernels.both, strict=True)]
    return {
        **case.columns(),
        **_speeds(case, row, {"fused": of_fused, "ring": of_ring}),
        "forward": _ratio(of_fused.forward, of_ring.forward),
        "forward + backward": _ratio(of_fused.both, of_ring.both),
        "slowest rank": f"{statistics.median(of_fused.both) / case.num_ranks / slowest:.2f}",
        "outside the kernels": f"{statistics.median(outside):.1f}% ({min(outside):.1f} to {max(outside):.1f})",
    }


class Part:
    """This process's rank of the real ring, or of a split into ring x ulysses. Collective."""

    def __init__(self, row: Row, num_ranks: int, ulysses: int, kernel: BlockKernel):
        mesh = runtime.build_mesh(runtime.ParallelConfig(context=num_ranks), ulysses)
        runtime.destroy_mesh()  # so that the next split can be built; the groups stay
        self.groups = mesh.ring, mesh.ulysses
        self.kernel = kernel
        device = row.q_SND.device
        order = shard_order(row.cu_seqlens, mesh.ring.size())[mesh.ring.rank()].reshape(ulysses, -1)
        self.tokens_T = torch.from_numpy(order[mesh.ulysses.rank()]).to(device)
        self.plan = plan_ring(row.cu_seqlens, mesh.ring.size(), mesh.ring.rank(), device)
        self.inputs = [x[self.tokens_T].requires_grad_() for x in (row.q_SND, row.k_SGD, row.v_SGD)]
        self.dout_TND = row.dout_SND[self.tokens_T]
        self.out_TND: Tensor
        self.gradients: tuple[Tensor, ...] = ()
        """Of q, k and v."""

    def forward(self) -> None:
        q, k, v = self.inputs
        self.out_TND = context_attention(q, k, v, self.plan, *self.groups, kernel=self.kernel)

    def backward(self) -> None:
        self.gradients = torch.autograd.grad(self.out_TND, self.inputs, self.dout_TND)


def measure_ranks(case: Case, splits: list[int], repetitions: int) -> list[dict[str, str]]:
    """torchrun's processes: the real ring and its ring x ulysses splits, in turns with the fused call, which every
    process makes over the whole row. Collective.

    Args:
        case: what is measured.
        splits: Ulysses ranks of each split.
        repetitions: turns that count.

    Returns:
        A row of the table for each split, cell by column.
    """
    row = case.row()
    fused, of_fused = Fused(row, case.kernel), Times()
    parts = [(ulysses, Part(row, case.num_ranks, ulysses, case.kernel), Times()) for ulysses in splits]
    for counts in _turns(case, repetitions):
        seconds = timed_together(fused.forward), timed_together(fused.backward)
        if counts:
            of_fused.add(*seconds)
        for _, part, times in parts:
            # All ranks work at the same time: one has its share of the FLOPs.
            seconds = timed_together(part.forward), timed_together(part.backward)
            if counts:
                times.add(*(s * case.num_ranks for s in seconds))
            else:
                _need_same("the output", part.out_TND.detach(), fused.out_SND[part.tokens_T])
                for name, found, whole in zip(("dq", "dk", "dv"), part.gradients, fused.gradients, strict=True):
                    _need_same(name, found, whole[part.tokens_T])
    return [
        {
            **case.columns(),
            "ring x ulysses": f"{case.num_ranks // ulysses} x {ulysses}",
            **_speeds(case, row, {"fused": of_fused, "a rank": times}),
            "forward": _ratio(of_fused.forward, times.forward),
            "forward + backward": _ratio(of_fused.both, times.both),
        }
        for ulysses, _, times in parts
    ]


def _turns(case: Case, repetitions: int) -> Iterator[bool]:
    """One turn to warm up, then those that count: whether this one does."""
    title = f"{case.name} {case.kernel.name}, {case.num_ranks} x {case.tokens}"
    hidden = True if runtime.global_rank() else None  # None: where there is no terminal
    for turn in tqdm(range(1 + repetitions), desc=title, unit="turn", disable=hidden, file=sys.stderr, leave=False):
        yield turn > 0


def _alone(calls: list[Callable[[], Any]]) -> float:
    """Seconds of some calls, one after another."""

    def all_of_them() -> None:
        for call in calls:
            call()

    return timed(all_of_them)[1]


def _need_same(what: str, found: Tensor, expected: Tensor) -> None:
    apart = difference(found, expected)
    if not apart <= TOLERANCE[expected.dtype]:
        raise RuntimeError(f"the sides differ: {what} of the ring is {apart:.1e} away from the fused call's")


def _speeds(case: Case, row: Row, sides: dict[str, Times]) -> dict[str, str]:
    """TFLOP/s of each side, forward and backward pass together; nothing on a CPU."""
    if runtime.device_type() == "cpu":
        return {}
    flops = (1 + BACKWARD) * forward_flops(row.cu_seqlens, case.heads)
    return {f"{name}, TFLOP/s": f"{flops / statistics.median(t.both) / 1e12:.0f}" for name, t in sides.items()}


def _ratio(fused: list[float], ring: list[float]) -> str:
    """Throughput of the ring over the fused call's: median of the turns, smallest and largest."""
    ratios = [f / r for f, r in zip(fused, ring, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
