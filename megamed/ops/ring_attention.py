"""Ring attention over packed documents (Liu et al., 2023, arXiv:2310.01889), in zigzag order.

Every rank keeps its queries. Keys and values go round the ring, one block in flight while the one before is computed;
the partial outputs are merged in fp32 by their log-sum-exps. In the backward pass keys and values go round again, and
each block's gradient follows one step behind its block, in fp32, R - 1 hops: from the block's first foreign rank, all
the way home, where the owner's own share is waiting.

Shapes: T tokens of a rank's shard, N query heads, G key/value heads (G divides N), D head width, R ring ranks.
A log-sum-exp is [N, T]; keys and values travel as one tensor kv [2, T, G, D].
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamed.ops.kernels import BlockKernel, pick_kernel
from megamed.ops.ring_plan import Block, RingPlan, Tokens


def ring_attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    plan: RingPlan,
    group: dist.ProcessGroup | None,
    kernel: BlockKernel | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention within each document of a packed row whose tokens are spread over a ring of ranks.

    Args:
        q_TND, k_TGD, v_TGD: this rank's queries, keys, values, in the order of `zigzag.shard_order`.
        plan: of the row and this rank, from `plan_ring`.
        group: the ring's process group, its ranks in the ring's order; None where the plan has one rank.
        kernel: computes the blocks; None for the best that the device has.
        scale: of the scores; None for 1 / sqrt(D).

    Returns:
        The attended values, [T, N, D], in q's type.
    """
    assert plan.num_ranks == 1 or plan.num_ranks == dist.get_world_size(group), "the plan is of another ring"
    kernel = kernel or pick_kernel(q_TND.device, q_TND.dtype, q_TND.shape[-1], plan.num_documents)
    scale = q_TND.shape[-1] ** -0.5 if scale is None else scale
    out = _RingAttention.apply(q_TND, k_TGD, v_TGD, plan, group, kernel, scale)
    assert isinstance(out, Tensor)
    return out


def attend_blocks(
    q_TND: Tensor, arriving: Iterable[Tensor], plan: RingPlan, kernel: BlockKernel, scale: float
) -> tuple[Tensor, Tensor]:
    """One rank's output, [T, N, D] in q's type, and its log-sum-exp, [N, T].

    Args:
        arriving: keys and values [2, T, G, D] in the order of the plan's steps.
    """
    merged = MergedOutput()
    for block, kv in zip(plan.blocks, arriving, strict=True):
        if block is not None:
            k, v = block.keys.take(kv, 1)
            merged.add(block.queries, *kernel.forward(block.queries.take(q_TND), k, v, block, scale))
    return merged.result(q_TND.dtype)


class MergedOutput:
    """Partial outputs of one rank's queries, merged in fp32 (fp64 where they are fp64).

    Queries that are no contiguous part of the shard are gathered and merged among themselves for as long as the
    blocks ask for the same ones, and only then put back in their places.
    """

    def __init__(self) -> None:
        self._all: tuple[Tensor, Tensor] | None = None
        self._some: tuple[Tensor, Tensor] | None = None
        self._queries: Tokens | None = None

    def add(self, queries: Tokens, out_TND: Tensor, lse_NT: Tensor) -> None:
        """Merge one block's output; the first block's queries are all of the shard's."""
        if self._all is None:
            self._all = out_TND.to(lse_NT.dtype), lse_NT
        elif queries.index is None:
            out, lse = self._all
            _merge(queries.take(out), queries.take(lse, 1), out_TND, lse_NT)
        elif queries is self._queries:
            assert self._some is not None
            _merge(*self._some, out_TND, lse_NT)
        else:
            self._put_back()
            self._queries, self._some = queries, (out_TND.to(lse_NT.dtype), lse_NT)

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The merged output in `dtype`, and its log-sum-exp."""
        self._put_back()
        assert self._all is not None
        return self._all[0].to(dtype), self._all[1]

    def _put_back(self) -> None:
        if self._queries is None or self._some is None or self._all is None:
            return
        out, lse = (self._queries.take(x, dim) for x, dim in zip(self._all, (0, 1), strict=True))
        _merge(out, lse, *self._some)
        index = self._queries.index
        assert index is not None
        self._all[0].index_copy_(0, index, out)
        self._all[1].index_copy_(1, index, lse)
        self._queries, self._some = None, None


def _merge(out_TND: Tensor, lse_NT: Tensor, more_TND: Tensor, more_lse_NT: Tensor) -> None:
    """Merge the attention over some more keys into `out_TND` and `lse_NT`, in place."""
    # A query without any key has no weight. flash-attn gives it +inf, others -inf.
    more_lse_NT = more_lse_NT.masked_fill(more_lse_NT == torch.inf, -torch.inf)
    weight_NT = torch.sigmoid(more_lse_NT - lse_NT).nan_to_num_()
    out_TND.lerp_(more_TND.to(out_TND.dtype), weight_NT.t().contiguous()[..., None])
    lse_NT.copy_(torch.logaddexp(lse_NT, more_lse_NT))


class SummedGradients:
    """Gradients of one rank's queries, and of whatever keys its blocks have, summed in fp32 (or fp64)."""

    def __init__(
        self,
        dout_TND: Tensor,
        q_TND: Tensor,
        out_TND: Tensor,
        lse_NT: Tensor,
        kernel: BlockKernel,
        scale: float,
    ):
        self._whole = dout_TND, q_TND, out_TND, lse_NT
        self._kernel, self._scale = kernel, scale
        self._dq_TND = torch.zeros_like(q_TND, dtype=lse_NT.dtype)
        self._queries: Tokens | None = None
        self._chosen = self._whole
        self._dq_chosen = self._dq_TND

    def add(self, block: Block, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one block; returns the gradients of its keys and values."""
        self._choose(block.queries)
        dout, q, out, lse = self._chosen
        dq, dk, dv = self._kernel.backward(dout, q, k_TGD, v_TGD, out, lse, block, self._scale)
        self._dq_chosen.add_(dq)
        return dk, dv

    def add_heads(self, block: Block, k_TGD: Tensor, v_TGD: Tensor, heads: slice, dkv_2TGD: Tensor) -> None:
        """Compute some key/value heads of a block that has all tokens; their gradients are added to `dkv_2TGD`."""
        if heads.start == heads.stop:
            return
        repeat = self._dq_TND.shape[1] // k_TGD.shape[1]
        queries = slice(heads.start * repeat, heads.stop * repeat)
        dout, q, out = (x[:, queries] for x in self._whole[:3])
        lse = self._whole[3][queries]
        k, v = k_TGD[:, heads], v_TGD[:, heads]
        dq, dk, dv = self._kernel.backward(dout, q, k, v, out, lse, block, self._scale)
        self._dq_TND[:, queries].add_(dq)
        dkv_2TGD[0, :, heads].add_(dk)
        dkv_2TGD[1, :, heads].add_(dv)

    def dq(self) -> Tensor:
        """The gradient of all queries."""
        self._put_back()
        return self._dq_TND

    def _choose(self, queries: Tokens) -> None:
        # One gathering does for as long as the blocks ask for the same queries.
        if queries is self._queries:
            return
        self._put_back()
        dout, q, out, lse = self._whole
        self._chosen = queries.take(dout), queries.take(q), queries.take(out), queries.take(lse, 1).contiguous()
        if queries.index is None:
            self._dq_chosen = queries.take(self._dq_TND)
        else:
            self._dq_chosen = torch.zeros_like(self._chosen[1], dtype=lse.dtype)
        self._queries = queries

    def _put_back(self) -> None:
        if self._queries is not None and self._queries.index is not None:
            self._queries.add_to(self._dq_TND, self._dq_chosen)
        self._queries = None


def add_to_keys(block: Block, dkv_2TGD: Tensor, parts: tuple[Tensor, Tensor]) -> None:
    """Add what `SummedGradients.add` returned to the gradient of all the keys and values of that rank."""
    for total, part in zip(dkv_2TGD, parts, strict=True):
        block.keys.add_to(total, part)


def halves(num_heads: int) -> tuple[slice, slice]:
    """The heads of a rank's own block that the backward pass computes first, and those that it computes last."""
    return slice(0, num_heads // 2), slice(num_heads // 2, num_heads)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        plan: RingPlan,
        group: dist.ProcessGroup | None,
        kernel: BlockKernel,
        scale: float,
    ) -> Tensor:
        if plan.num_ranks == 1:
            block = plan.blocks[0]
            assert block is not None
            out, lse = kernel.forward(q_TND, k_TGD, v_TGD, block, scale)
            out = out.to(q_TND.dtype)
        else:
            arriving = _travel(torch.stack((k_TGD, v_TGD)), plan, group)
            out, lse = attend_blocks(q_TND, arriving, plan, kernel, scale)
        ctx.save_for_backward(q_TND, k_TGD, v_TGD, out, lse)
        ctx.plan, ctx.group, ctx.kernel, ctx.scale = plan, group, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TND: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if ctx.plan.num_ranks == 1:
            grads = ctx.kernel.backward(dout_TND, q, k, v, out, lse, ctx.plan.blocks[0], ctx.scale)
            dq, dk, dv = (grad.to(q.dtype) for grad in grads)
        else:
            gradients = SummedGradients(dout_TND, q, out, lse, ctx.kernel, ctx.scale)
            dk, dv = _backward_ring(gradients, k, v, lse.dtype, ctx.plan, ctx.group).to(q.dtype)
            dq = gradients.dq().to(q.dtype)
        return dq, dk, dv, None, None, None, None


def _backward_ring(
    gradients: SummedGradients,
    k_TGD: Tensor,
    v_TGD: Tensor,
    dtype: torch.dtype,
    plan: RingPlan,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Send keys and values round; returns the gradient of this rank's own, [2, T, G, D] in `dtype`."""
    own, *others = plan.blocks
    assert own is not None
    # The first hop of the keys and the last one of the gradients have no other rank's block to hide behind. So a part
    # of the own block's heads is computed first, the rest last.
    first, rest = halves(k_TGD.shape[1])
    arriving = _travel(torch.stack((k_TGD, v_TGD)), plan, group)
    dkv_own = k_TGD.new_zeros((2, *k_TGD.shape), dtype=dtype)
    dkv, spare = torch.zeros_like(dkv_own), torch.empty_like(dkv_own)
    hops: list[dist.Work] = []

    next(arriving)
    gradients.add_heads(own, k_TGD, v_TGD, first, dkv_own)
    for block, kv in zip(others, arriving, strict=True):
        parts = None if block is None else gradients.add(block, *block.keys.take(kv, 1))
        if hops:  # with which the block's gradient comes from those that had the block before
            _wait(hops)
            dkv, spare = spare, dkv
        if block is not None and parts is not None:
            add_to_keys(block, dkv, parts)
        hops = _exchange(dkv, spare, group)
    gradients.add_heads(own, k_TGD, v_TGD, rest, dkv_own)
    _wait(hops)
    return dkv_own.add_(spare)


def _travel(kv_2TGD: Tensor, plan: RingPlan, group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """Each rank's keys and values, this rank's first; while the caller works on one, the next is in flight."""
    spare = torch.empty_like(kv_2TGD)
    for step in range(plan.num_ranks):
        hops = _exchange(kv_2TGD, spare, group) if step + 1 < plan.num_ranks else []
        yield kv_2TGD
        # Neither buffer is touched before both hops are done: one is being sent, the other filled.
        _wait(hops)
        kv_2TGD, spare = spare, kv_2TGD


def _exchange(sent: Tensor, received: Tensor, group: dist.ProcessGroup | None) -> list[dist.Work]:
    """Start one hop: `sent` goes to the next rank of the ring, and what the one before sends fills `received`."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    there = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % size)
    here = dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size)
    # All ranks start their hops in one order, which is what pairs them; a ring of two has one peer for both.
    return dist.batch_isend_irecv([there, here])


def _wait(hops: list[dist.Work]) -> None:
    for hop in hops:
        hop.wait()
