"""Keeping experts equally busy, within each pool and never across pools.

Balancing all experts against each other, as routers do by default, would undo what pools are for: with a batch of
chest studies the chest experts are to be busier than the others. So each term here compares an expert with its own
pool alone, and has no gradient that moves tokens from one pool to another.

Shapes: T tokens of this rank, E experts, P pools. `member_PE` is 1 where expert e is in pool p. A pick is one of the
top-k choices of a token.
"""

import torch
import torch.distributed as dist
from torch import Tensor

_TINY = 1e-20


def pool_balance_share(
    scores_TE: Tensor, picked_TE: Tensor, member_PE: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """This rank's share of the load-balancing loss of one packed row; over the group's ranks the shares sum to it.

    The loss of Switch Transformer (arXiv:2101.03961) of each pool, n * sum_e(f_e * p_e) for its n experts, where f_e
    is the share of the pool's picks that went to expert e, and p_e is e's score relative to the scores of the whole
    pool, averaged over the pool's picks. Pools count by their share of all picks. 1 is perfect balance, n the worst.
    With one pool it is the usual loss. A pool without picks counts nothing.

    Args:
        scores_TE: above 0 where an expert can be chosen.
        picked_TE: bool, the picks of this rank's real tokens.
        member_PE: float.
        group: ranks that hold the rest of the row.
    """
    picked_TE = picked_TE.float()
    picks_E = picked_TE.sum(0)
    dist.all_reduce(picks_E, group=group)
    # By expert: its score within its pool, and how many picks its pool has of the token.
    within_TE = scores_TE / _of_pool(scores_TE, member_PE).clamp(min=_TINY)
    sums_E = (within_TE * _of_pool(picked_TE, member_PE)).sum(0)
    size_E = _of_pool(torch.ones_like(picks_E)[None], member_PE)[0]
    total_E = _of_pool(picks_E[None], member_PE)[0]
    terms_E = size_E * picks_E * sums_E / total_E.clamp(min=1)
    return terms_E.sum() / picks_E.sum().clamp(min=1)


def _of_pool(x_TE: Tensor, member_PE: Tensor) -> Tensor:
    """For each expert, the sum over the experts of its pool."""
    pool_E = member_PE.argmax(0)
    return x_TE.new_zeros(len(x_TE), len(member_PE)).index_add(1, pool_E, x_TE)[:, pool_E]


def z_loss_share(logits_TE: Tensor, real_T: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of the router's z-loss (ST-MoE, arXiv:2202.08906) of one packed row.

    Megatron averages it over each rank's own tokens and then over ranks. With padding at the end of the row the ranks
    hold different numbers of real tokens, and the mean of means is not the mean.

    Args:
        logits_TE: the router's.
        real_T: bool, False for padding.
        group: ranks that hold the rest of the row.
    """
    squared_T = torch.logsumexp(logits_TE, dim=-1).square() * real_T
    count = real_T.sum()
    dist.all_reduce(count, group=group)
    return squared_T.sum() / count.clamp(min=1)


@torch.no_grad()
def move_bias(bias_E: Tensor, picks_E: Tensor, member_PE: Tensor, rate: float) -> None:
    """Move each expert's bias towards its pool's mean load, in place (DeepSeek-V3, arXiv:2412.19437, by pool).

    Args:
        bias_E: added to scores where experts are chosen, and to nothing else.
        picks_E: picks of the global batch.
        member_PE: float.
        rate: what a bias moves by.
    """
    picks_E = picks_E.to(bias_E.dtype)
    mean_E = (member_PE @ picks_E / member_PE.sum(1)) @ member_PE
    bias_E += rate * torch.sign(mean_E - picks_E)
