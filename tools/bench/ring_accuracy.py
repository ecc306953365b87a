"""Rounding errors of ring attention in bf16, against fp64: one fused call, our ring, one that adds up in bf16.

    python tools/bench/ring_accuracy.py                        8 shards, on the GPU if there is one
    python tools/bench/ring_accuracy.py --ring 64 --seeds 1    more shards

Shapes: S tokens of the row, N query heads, G key/value heads, D head width, T tokens of a shard.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamed.ops.kernels import KERNELS, BlockKernel, named_kernel, pick_kernel
from megamed.ops.one_process import by_step, ring_in_one_process
from megamed.ops.ring_plan import Block, RingPlan, plan_ring
from megamed.ops.zigzag import shard_order

QUANTITIES = ("out", "dq", "dk", "dv")
Method = Callable[[list[Tensor], np.ndarray, int, BlockKernel], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Shape:
    """A packed row.

    Attributes:
        name: in the table.
        lengths: tokens of each document.
        num_heads, num_kv_heads, head_dim: N, G and D.
    """

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = (
    Shape("one document of 1024", (1024,), 4, 1, 128),
    Shape("documents of 96 to 512", (512, 96, 288, 128), 4, 2, 64),
    Shape("64 documents of 16", (16,) * 64, 4, 4, 64),
)


def fused(inputs: list[Tensor], cu_seqlens: np.ndarray, ring: int, kernel: BlockKernel) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of one call over the whole row, rounded once."""
    q, k, v, dout = inputs
    block = plan_ring(cu_seqlens, 1, 0, q.device).blocks[0]
    assert block is not None
    scale = q.shape[-1] ** -0.5
    out, lse = kernel.forward(q, k, v, block, scale)
    return out, *kernel.backward(dout, q, k, v, out, lse, block, scale)


def ours(inputs: list[Tensor], cu_seqlens: np.ndarray, ring: int, kernel: BlockKernel) -> tuple[Tensor, ...]:
    """The same of megamed's ring."""
    q, k, v, dout = inputs
    return ring_in_one_process(q, k, v, dout, cu_seqlens, ring, kernel)


@dataclass
class _Rounding:
    """A kernel whose results are rounded to the inputs' type, as a GPU's kernels round them."""

    inner: BlockKernel
    name: str = "rounding"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return self.inner.unavailable(device, dtype, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = self.inner.forward(q, k, v, block, scale)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self.inner.backward(dout, q, k, v, out, lse, block, scale)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def ours_of_rounded_parts(
    inputs: list[Tensor], cu_seqlens: np.ndarray, ring: int, kernel: BlockKernel
) -> tuple[Tensor, ...]:
    """megamed's ring over blocks whose results are rounded before they are added up."""
    return ours(inputs, cu_seqlens, ring, _Rounding(kernel))


def adding_in_bf16(
    inputs: list[Tensor], cu_seqlens: np.ndarray, ring: int, kernel: BlockKernel
) -> tuple[Tensor, ...]:
    """The same of a ring with the same blocks, whose running output and gradients are kept in the inputs' type."""
    q, k, v, dout = inputs
    order_RT = torch.from_numpy(shard_order(cu_seqlens, ring)).to(q.device)
    plans = [plan_ring(cu_seqlens, ring, rank, q.device) for rank in range(ring)]
    kvs = [torch.stack((k[tokens], v[tokens])) for tokens in order_RT]
    dkvs = [torch.zeros_like(kv) for kv in kvs]
    outs, dqs = [], []
    for plan, tokens in zip(plans, order_RT, strict=True):
        out, dq = _rank_in_bf16(q[tokens], dout[tokens], kvs, dkvs, plan, kernel)
        outs.append(out)
        dqs.append(dq)
    place = order_RT.flatten().argsort()
    dks, dvs = zip(*dkvs, strict=True)
    return tuple(torch.cat(parts)[place] for parts in (outs, dqs, dks, dvs))


def _rank_in_bf16(
    q_TND: Tensor, dout_TND: Tensor, kvs: list[Tensor], dkvs: list[Tensor], plan: RingPlan, kernel: BlockKernel
) -> tuple[Tensor, Tensor]:
    """One rank's out and dq; adds to `dkvs`."""
    scale = q_TND.shape[-1] ** -0.5
    out = torch.zeros_like(q_TND)
    lse = torch.full(q_TND.shape[:2], -torch.inf, device=q_TND.device)
    steps: list[tuple[Block, Tensor, int]] = [
        (block, kv, (plan.rank - step) % plan.num_ranks)
        for step, (block, kv) in enumerate(zip(plan.blocks, by_step(kvs, plan), strict=True))
        if block is not None
    ]
    for block, kv, _ in steps:
        k, v = block.keys.take(kv, 1)
        part, part_lse = kernel.forward(block.queries.take(q_TND), k, v, block, scale)
        known = block.queries.take(lse)
        total = torch.logaddexp(known, part_lse.t())
        known_share, share = (known - total).exp()[..., None], (part_lse.t() - total).exp()[..., None]
        merged = (block.queries.take(out) * known_share + part * share).to(out.dtype)
        chosen = block.queries.take(torch.arange(len(out), device=out.device))
        out[chosen], lse[chosen] = merged, total
    dq = torch.zeros_like(q_TND)
    for block, kv, j in steps:
        k, v = block.keys.take(kv, 1)
        dout, q, known = (block.queries.take(x) for x in (dout_TND, q_TND, out))
        total = block.queries.take(lse).t().contiguous()
        part, *parts = kernel.backward(dout, q, k, v, known, total, block, scale)
        block.queries.add_to(dq, part)
        for sums, more in zip(dkvs[j], parts, strict=True):
            block.keys.add_to(sums, more)
    return out, dq


METHODS: dict[str, Method] = {
    "one fused call": fused,
    "megamed's ring": ours,
    "megamed's ring, blocks rounded": ours_of_rounded_parts,
    "a ring adding in bf16": adding_in_bf16,
}


def errors(
    shape: Shape, ring: int, num_seeds: int, kernel: BlockKernel, device: torch.device
) -> dict[str, list[float]]:
    """Each method's error of each of `QUANTITIES`: rms over all seeds, by the rms of the fp64 values."""
    cu_seqlens = np.concatenate([[0], np.cumsum(shape.lengths)])
    squares = {method: np.zeros(len(QUANTITIES)) for method in METHODS}
    norms = np.zeros(len(QUANTITIES))
    for seed in range(num_seeds):
        generator = torch.Generator().manual_seed(seed)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
        drawn = [torch.randn(int(cu_seqlens[-1]), n, shape.head_dim, generator=generator) for n in heads]
        inputs = [x.to(device, torch.bfloat16) for x in drawn]
        truth = fused([x.double() for x in inputs], cu_seqlens, 1, KERNELS["math"])
        norms += [float(value.square().sum()) for value in truth]
        for method, run in METHODS.items():
            values = run(inputs, cu_seqlens, ring, kernel)
            pairs = zip(values, truth, strict=True)
            squares[method] += [float((value.double() - exact).square().sum()) for value, exact in pairs]
    return {method: np.sqrt(total / norms).tolist() for method, total in squares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ring", type=int, default=8, help="shards; 8 by default")
    parser.add_argument("--seeds", type=int, default=4, help="draws; 4 by default")
    parser.add_argument("--kernel", choices=KERNELS, help="the fastest that can run here by default")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"bf16, {args.ring} shards, {args.seeds} draws, {device.type}; relative rms error against fp64")
    print(f"| row | kernel | method | {' | '.join(QUANTITIES)} |\n|---|---|---|" + "---:|" * len(QUANTITIES))
    for shape in SHAPES:
        wanted = device, torch.bfloat16, shape.head_dim
        kernel = named_kernel(args.kernel, *wanted) if args.kernel else pick_kernel(*wanted, len(shape.lengths))
        table = errors(shape, args.ring, args.seeds, kernel, device)
        reference = table["one fused call"]
        for method, row in table.items():
            cells = [f"{error:.2e} ({error / base:.2f})" for error, base in zip(row, reference, strict=True)]
            print(f"| {shape.name} | {kernel.name} | {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
