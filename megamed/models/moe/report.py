"""What a person is told of the routing: few numbers with plain names, out of the counts.

Shapes: L mixture-of-experts layers, R rows of `RoutingCounts` (P specialties, tokens without any, all tokens),
E experts in the numbering of `Pools`, Q pools, N expert-parallel ranks.
"""

import numpy as np

from megamed.models.moe.metrics import RoutingCounts
from megamed.models.moe.pools import Pools

NONE, ALL = "none", "all"


def row_names(pools: Pools) -> tuple[str, ...]:
    """The rows of the counts: specialties, tokens without any, all tokens."""
    return (*pools.specialties, NONE, ALL)


def routing_metrics(counts: RoutingCounts, pools: Pools, expert_parallel: int) -> dict[str, float]:
    """What `metrics.jsonl` and Weights & Biases have of one step.

    - `moe/pool_<name>`: share of all choices that went to the pool.
    - `moe/entropy`: of the router's distribution over experts, nats, mean over tokens and layers.
    - `moe/busiest_rank`: load of the busiest expert-parallel rank relative to the mean, in the worst layer.
    - `moe/busiest_expert`: load of the busiest expert relative to the mean of its pool, in the worst layer.
    - `moe/match`: of the choices of tokens with specialties, the share that went to pools of theirs; left out where no
      token has any.

    Args:
        counts: of one step's global batch.
        pools: the layer's.
        expert_parallel: ranks that share the experts of a layer.
    """
    picks_LRE = counts.picks
    all_LE = picks_LRE[:, -1]
    shares_Q = pool_shares(all_LE.sum(0), pools)
    metrics = {f"moe/pool_{name}": share for name, share in zip(pools.names, shares_Q.tolist(), strict=True)}
    metrics |= {
        "moe/entropy": float(counts.entropy.mean()),
        "moe/busiest_rank": float(rank_loads(all_LE, expert_parallel).max()),
        "moe/busiest_expert": float(expert_loads(all_LE, pools).max()),
    }
    of_pools, of_all = match_counts(picks_LRE, pools)
    if of_all.any():
        metrics["moe/match"] = float(of_pools.sum() / of_all.sum())
    return {name: round(value, 6) for name, value in metrics.items()}


def pool_shares(picks_E: np.ndarray, pools: Pools) -> np.ndarray:
    """Share of the choices that went to each pool [..., Q]; 0 where there are no choices.

    Args:
        picks_E: [..., E].
        pools: the layer's.
    """
    picks_Q = np.stack([picks_E[..., pools.members[name]].sum(-1) for name in pools.names], axis=-1)
    return picks_Q / np.maximum(picks_Q.sum(-1, keepdims=True), 1)


def rank_loads(picks_E: np.ndarray, expert_parallel: int) -> np.ndarray:
    """Choices that each expert-parallel rank serves, relative to the mean over ranks [..., N].

    A rank holds a contiguous part of the experts.

    Args:
        picks_E: [..., E].
        expert_parallel: N, which divides E.
    """
    picks_N = picks_E.reshape(*picks_E.shape[:-1], expert_parallel, -1).sum(-1)
    return picks_N / np.maximum(picks_N.mean(-1, keepdims=True), 1 / expert_parallel)


def expert_loads(picks_E: np.ndarray, pools: Pools) -> np.ndarray:
    """Choices of each expert relative to the mean of its pool [..., E]; 0 in a pool that nobody chose.

    Args:
        picks_E: [..., E].
        pools: the layer's.
    """
    loads_E = np.zeros(picks_E.shape)
    for members in pools.members.values():
        of_pool = picks_E[..., members]
        loads_E[..., members] = of_pool / np.maximum(of_pool.mean(-1, keepdims=True), 1 / len(members))
    return loads_E


def match_counts(picks_LRE: np.ndarray, pools: Pools) -> tuple[np.ndarray, np.ndarray]:
    """Choices of the tokens that have specialties: those of experts in pools of theirs [L], and all of them [L].

    A token of two specialties is in the rows of both. A choice of an expert is of one pool, so among the choices of
    pools that a token calls it is counted once.

    Args:
        picks_LRE: the counts.
        pools: the layer's.
    """
    own = [picks_LRE[:, row][:, pools.members[name]].sum(-1) for row, name in enumerate(pools.specialties)]
    of_pools = np.sum(own, axis=0) if own else np.zeros(len(picks_LRE), np.int64)
    return of_pools, (picks_LRE[:, -1] - picks_LRE[:, -2]).sum(-1)
