"""The ring attention of R ranks played by one process, without a process group: the same blocks, the same bits.

For what needs no links: accuracy, and what the blocks of a long row cost on one GPU.

Shapes: S tokens of the row, T = S / R of a shard, N query heads, G key/value heads, D head width, R ring ranks.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megamed.ops.kernels import BlockKernel
from megamed.ops.ring_attention import SummedGradients, add_to_keys, attend_blocks, halves
from megamed.ops.ring_plan import RingPlan, plan_ring
from megamed.ops.zigzag import shard_order


def ring_in_one_process(
    q_SND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    dout_SND: Tensor,
    cu_seqlens: np.ndarray,
    num_ranks: int,
    kernel: BlockKernel,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of a whole row, in the row's order, as R ranks compute them.

    Args:
        q_SND, k_SGD, v_SGD, dout_SND: in the row's order.
        cu_seqlens, num_ranks, causal: as for `plan_ring`.
        kernel: computes the blocks.

    Returns:
        out [S, N, D], dq [S, N, D], dk and dv [S, G, D].
    """
    order_RT = torch.from_numpy(shard_order(cu_seqlens, num_ranks)).to(q_SND.device)
    plans = [plan_ring(cu_seqlens, num_ranks, rank, q_SND.device, causal) for rank in range(num_ranks)]
    scale = q_SND.shape[-1] ** -0.5
    qs, douts = ([x[tokens] for tokens in order_RT] for x in (q_SND, dout_SND))
    kvs = [torch.stack((k_SGD[tokens], v_SGD[tokens])) for tokens in order_RT]
    outs, lses = zip(
        *(attend_blocks(q, by_step(kvs, plan), plan, kernel, scale) for q, plan in zip(qs, plans, strict=True)),
        strict=True,
    )
    sums = [SummedGradients(*parts, kernel, scale) for parts in zip(douts, qs, outs, lses, strict=True)]
    dkvs = _backward(sums, kvs, plans, lses[0].dtype)
    dks, dvs = zip(*(dkv.to(q_SND.dtype) for dkv in dkvs), strict=True)
    place = order_RT.flatten().argsort()
    dqs = [gradients.dq().to(q_SND.dtype) for gradients in sums]
    out, dq, dk, dv = (torch.cat(parts)[place] for parts in (outs, dqs, dks, dvs))
    return out, dq, dk, dv


def by_step(kvs: list[Tensor], plan: RingPlan) -> Iterator[Tensor]:
    """All ranks' keys and values in the order in which they come to the plan's rank."""
    return (kvs[(plan.rank - step) % plan.num_ranks] for step in range(plan.num_ranks))


def _backward(
    sums: list[SummedGradients], kvs: list[Tensor], plans: list[RingPlan], dtype: torch.dtype
) -> list[Tensor]:
    own, dkvs = ([torch.zeros_like(kv, dtype=dtype) for kv in kvs] for _ in range(2))
    first, rest = halves(kvs[0].shape[2])
    for heads, steps in ((first, range(1, len(plans))), (rest, range(0))):
        for rank, plan in enumerate(plans):
            assert plan.blocks[0] is not None
            k, v = kvs[rank]
            sums[rank].add_heads(plan.blocks[0], k, v, heads, own[rank])
        # Step by step: a block's gradient is added up in the order of the ranks that it visits.
        for step in steps:
            for plan in plans:
                block, j = plan.blocks[step], (plan.rank - step) % plan.num_ranks
                if block is not None:
                    parts = sums[plan.rank].add(block, *block.keys.take(kvs[j], 1))
                    add_to_keys(block, dkvs[j], parts)
    return [dkv.add_(other) for dkv, other in zip(own, dkvs, strict=True)]
