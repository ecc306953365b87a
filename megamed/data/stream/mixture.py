"""Which data set the next sample comes from, and which of its samples that is.

The data set is the one whose share lags furthest behind its weight, as in Megatron-core's blended data sets: after any
number of samples each has its share to within one sample or so. Within a data set every pass goes through all samples
once, in an order of its own that the seed decides.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Pick:
    """Sample number `index` of data set number `dataset`, in pass `epoch` over it."""

    dataset: int
    epoch: int
    index: int


@dataclass(frozen=True)
class MixtureState:
    """Where a mixture stands.

    Attributes:
        drawn: samples drawn of each data set so far.
        credit: how many samples each lags behind its share.
    """

    drawn: tuple[int, ...]
    credit: tuple[float, ...]


class Mixture:
    """An endless sequence of samples of several data sets; its state is all that it remembers.

    Args:
        names: of the data sets; the order within one depends on its own name, and not on which others there are.
        sizes: samples of each, at least one.
        weights: of each, above 0; their sum does not matter.
        seed: decides the order within each.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float], seed: int):
        self.names, self.sizes, self.seed = tuple(names), tuple(sizes), seed
        self.shares = tuple(weight / sum(weights) for weight in weights)
        # Samples that wait to be packed are of this pass or the one before.
        self._order = lru_cache(2 * len(self.names))(self._permutation)

    def start(self) -> MixtureState:
        """The state before the first sample."""
        return MixtureState((0,) * len(self.names), (0.0,) * len(self.names))

    def turn(self, state: MixtureState) -> tuple[int, MixtureState]:
        """Whose turn it is: the number of a data set, and the state in which it has had it."""
        credit = [c + share for c, share in zip(state.credit, self.shares, strict=True)]
        dataset = max(range(len(credit)), key=credit.__getitem__)
        credit[dataset] -= 1.0
        return dataset, replace(state, credit=tuple(credit))

    def draw(self, state: MixtureState, dataset: int) -> tuple[Pick, MixtureState]:
        """The next sample of a data set, and the state in which it is drawn."""
        epoch, place = divmod(state.drawn[dataset], self.sizes[dataset])
        drawn = list(state.drawn)
        drawn[dataset] += 1
        return Pick(dataset, epoch, int(self._order(dataset, epoch)[place])), replace(state, drawn=tuple(drawn))

    def _permutation(self, dataset: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, zlib.crc32(self.names[dataset].encode()), epoch))
        return rng.permutation(np.arange(self.sizes[dataset], dtype=np.int32))
