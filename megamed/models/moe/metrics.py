"""What all routers counted in a step, summed over the global batch.

Shapes: P specialties, R = P + 2 rows (the specialties, tokens without any, all tokens), L mixture-of-experts layers
of the whole model, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megamed.models.moe.config import MoEConfig
from megamed.models.moe.router import Router
from megamed.runtime import current_device

AUX_LOSSES = ("load_balancing_loss", "z_loss")


@dataclass(frozen=True)
class RoutingCounts:
    """Routing of one step's global batch.

    Attributes:
        picks: int64 [L, R, E], top-k choices of tokens, without padding; a token with two specialties is in the rows
            of both, and once in the last.
        entropy: [L], mean over tokens of the entropy of the router's scores, nats.
    """

    picks: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class StepStatistics:
    """What routers counted in one step, the same on every rank.

    Attributes:
        counts: the choices.
        losses: mean over layers and microbatches of each auxiliary loss, before its coefficient; those that are on.
    """

    counts: RoutingCounts
    losses: dict[str, float]


def take_statistics(
    chunks: Iterable[nn.Module], moe: MoEConfig, layer_freq: Sequence[int], num_microbatches: int
) -> StepStatistics:
    """Sum what the routers of all ranks counted, and start anew. Collective over all ranks.

    Args:
        chunks: this rank's part of the model.
        moe: the settings.
        layer_freq: 1 for each layer with experts, 0 for the others, as in Megatron's configuration.
        num_microbatches: of the global batch.
    """
    pools, place = moe.resolved, _places(layer_freq)
    shape = (len(place), len(pools.specialties) + 2, pools.num_experts)
    picks_LRE = torch.zeros(shape, dtype=torch.float64, device=current_device())
    sums_L3 = picks_LRE.new_zeros(len(place), 3)
    for router in _routers(chunks):
        if (seen := router.statistics) is not None:
            row = place[router.layer_number]
            picks_LRE[row] = seen.picks_RE
            sums_L3[row] = torch.stack([seen.entropy, seen.load_balancing_loss, seen.z_loss])
            router.statistics = None
    total = torch.cat([picks_LRE.flatten(), sums_L3.flatten()])
    dist.all_reduce(total)
    picks = total[: picks_LRE.numel()].view(shape).cpu().numpy().astype(np.int64)
    entropy, *losses = total[picks_LRE.numel() :].view(-1, 3).cpu().numpy().T
    tokens = picks[:, -1].sum(1) / moe.top_k
    means = {name: loss.mean() / num_microbatches for name, loss in zip(AUX_LOSSES, losses, strict=True)}
    return StepStatistics(
        RoutingCounts(picks, entropy / np.maximum(tokens, 1)), {name: float(m) for name, m in means.items() if m}
    )


def move_biases(chunks: Iterable[nn.Module], layer_freq: Sequence[int], counts: RoutingCounts) -> None:
    """Move the biases of this rank's routers that balance by them, after a step.

    Args:
        chunks: this rank's part of the model.
        layer_freq: as in `take_statistics`.
        counts: the step's.
    """
    place = _places(layer_freq)
    for router in _routers(chunks):
        router.move_bias(torch.from_numpy(counts.picks[place[router.layer_number], -1]))


def _routers(chunks: Iterable[nn.Module]) -> Iterator[Router]:
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, Router))


def _places(layer_freq: Sequence[int]) -> dict[int, int]:
    """Of each layer with experts, by its number in the model, from 1: which of those it is."""
    numbers = [number for number, has_experts in enumerate(layer_freq, 1) if has_experts]
    return {number: place for place, number in enumerate(numbers)}
