"""Context parallelism in two dimensions: Ulysses (Jacobs et al., 2023, arXiv:2309.14509) inside, a ring outside.

A ring rank's shard of the row is split over U Ulysses ranks, each with the tokens of a U-th part and all heads. One
all-to-all turns that into all tokens of the shard and a U-th of the heads, over which the ring then goes; another
one turns the output back.

Shapes: T tokens of a rank, N query heads, G key/value heads (G divides N), D head width, U Ulysses ranks,
X and Y any numbers of heads.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megamed.ops.kernels import BlockKernel
from megamed.ops.ring_attention import ring_attention
from megamed.ops.ring_plan import RingPlan
from megamed.utils import UserError


def context_attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    plan: RingPlan,
    ring_group: dist.ProcessGroup | None,
    ulysses_group: dist.ProcessGroup | None,
    kernel: BlockKernel | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention within each document of a packed row that is spread over ring x Ulysses ranks.

    Args:
        q_TND, k_TGD, v_TGD: this rank's part of its ring shard: the u-th of U equal, contiguous parts.
        plan: of the row and this ring rank, from `plan_ring`; its shard has U * T tokens.
        ring_group: as for `ring_attention`.
        ulysses_group: the ranks that share the ring shard, in the order of their parts; None for this rank alone.
        kernel, scale: as for `ring_attention`.

    Returns:
        The attended values, [T, N, D].

    Raises:
        UserError: the heads do not divide over the Ulysses ranks.
    """
    if ulysses_group is None or dist.get_world_size(ulysses_group) == 1:
        return ring_attention(q_TND, k_TGD, v_TGD, plan, ring_group, kernel, scale)
    scale = q_TND.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = _SplitHeads.apply(q_TND, k_TGD, v_TGD, ulysses_group)
    out = ring_attention(q, k, v, plan, ring_group, kernel, scale)
    out = _JoinHeads.apply(out, ulysses_group)
    assert isinstance(out, Tensor)
    return out


def kv_copies(num_heads: int, num_kv_heads: int, ulysses: int) -> int:
    """How often each key/value head is sent, so that each Ulysses rank's query heads find theirs: U / gcd(G, U).

    Args:
        num_heads, num_kv_heads: N and G, of one tensor-parallel rank.
        ulysses: U.

    Raises:
        UserError: U does not divide the query heads so that each rank's share the same number of key/value heads.
    """
    copies = ulysses // math.gcd(num_kv_heads, ulysses)
    if num_heads % (num_kv_heads * copies):
        raise UserError(
            f"attention.ulysses={ulysses} does not fit {num_heads} query heads and {num_kv_heads} key/value heads of "
            f"a tensor-parallel rank: {num_kv_heads} x {copies} copies must divide {num_heads}; choose a divisor of "
            f"{num_kv_heads}",
            everywhere=True,
        )
    return copies


def pick_split(context: int, num_heads: int, num_kv_heads: int, max_ulysses: int) -> tuple[int, int]:
    """Split C context-parallel ranks into (ring, ulysses): the largest Ulysses that sends no head twice.

    The more Ulysses ranks, the fewer bytes. A ring hop carries the same bytes whatever U is, U times the tokens of a
    U-th of the heads, but there are only C / U - 1 of them; the all-to-alls carry (U - 1) / U of a rank's q, k, v and
    output. In units of a rank's keys, in bf16, forward and backward together with n = N / G:

        8 (C / U - 1) + 4 (n + 1) (U - 1) / U  =  (8 C - 4 (n + 1)) / U + constant

    which falls with U as soon as 2 C > n + 1. Below, for two ranks and n = 4, it is 10 units against 8: still one
    attention call over whole heads in place of two that are merged. All-to-alls have nothing to hide behind, which is
    why `max_ulysses` should be what one node's links join.

    Args:
        context: C, ranks that share a row.
        num_heads, num_kv_heads: of one tensor-parallel rank.
        max_ulysses: the most Ulysses ranks; the ranks of a node, say.
    """
    shared = math.gcd(context, num_kv_heads, num_heads)
    ulysses = max(size for size in range(1, min(shared, max_ulysses) + 1) if shared % size == 0)
    return context // ulysses, ulysses


class _SplitHeads(torch.autograd.Function):
    """q [T, N, D], k and v [T, G, D] of this rank's tokens to all tokens' [U * T, N / U, D] and [U * T, G' / U, D]."""

    @staticmethod
    def forward(
        ctx: Any, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        ranks = dist.get_world_size(group)
        copies = kv_copies(q_TND.shape[1], k_TGD.shape[1], ranks)
        ctx.group, ctx.copies = group, copies
        parts = [q_TND, *(x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k_TGD, v_TGD))]
        ctx.widths = [x.shape[1] // ranks for x in parts]
        sent_UTXD = torch.cat([x.unflatten(1, (ranks, -1)).transpose(0, 1) for x in parts], 2)
        q, k, v = _all_to_all(sent_UTXD, group).flatten(0, 1).split(ctx.widths, 1)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ranks = dist.get_world_size(ctx.group)
        sent_UTXD = torch.cat(grads, 1).unflatten(0, (ranks, -1))
        received = _all_to_all(sent_UTXD, ctx.group).split(ctx.widths, 2)
        dq, dk, dv = (x.transpose(0, 1).flatten(1, 2) for x in received)
        if ctx.copies > 1:
            dk, dv = (x.unflatten(1, (-1, ctx.copies)).sum(2) for x in (dk, dv))
        return dq, dk, dv, None


class _JoinHeads(torch.autograd.Function):
    """[U * T, N / U, D], all tokens of the shard, to [T, N, D], this rank's."""

    @staticmethod
    def forward(ctx: Any, out_SXD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received_UTXD = _all_to_all(out_SXD.unflatten(0, (dist.get_world_size(group), -1)), group)
        return received_UTXD.transpose(0, 1).flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TND: Tensor) -> tuple[Tensor, None]:
        sent_UTXD = dout_TND.unflatten(1, (dist.get_world_size(ctx.group), -1)).transpose(0, 1)
        return _all_to_all(sent_UTXD, ctx.group).flatten(0, 1), None


def _all_to_all(x_UTXD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row u of the result is what rank u has in this rank's row."""
    x_UTXD = x_UTXD.contiguous()
    received = torch.empty_like(x_UTXD)
    dist.all_to_all_single(received, x_UTXD, group=group)
    return received
