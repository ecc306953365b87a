"""Which tokens of a packed row a rank holds: zigzag over the ring, then parts for Ulysses and tensor-parallel ranks.

Everything here is arithmetic that each rank does by itself on the row's bounds, which all ranks of a replica share.

The row is first put into an order in which every rank's part is one stretch: ring rank by ring rank as
`megamed.ops.zigzag` deals the documents' chunks out. The ring rank's Ulysses ranks hold its tokens in equal
stretches, and with sequence parallelism their tensor-parallel ranks split a stretch once more.

Attention of other libraries (`Mesh.document_multiple` above 1) wants the zigzag over all context ranks, also where it
trades heads, and chunks of one length, for which the documents have been filled up.

Shapes: S tokens of the row.
"""

from dataclasses import dataclass

import numpy as np

from megamed.data import Microbatch
from megamed.ops.zigzag import shard_order
from megamed.parallel.exchange import Shard
from megamed.runtime import Mesh


def splits_sequence(mesh: Mesh) -> bool:
    """Whether tensor-parallel ranks hold different tokens between their matrix products."""
    return mesh.config.sequence and mesh.config.tensor > 1


@dataclass(frozen=True)
class RowOrder:
    """The order in which a row is dealt out."""

    order_S: np.ndarray
    """The row's tokens, context rank after context rank."""
    place_S: np.ndarray
    """Where each token of the row stands in that order."""

    def of_context_rank(self, rank: int, num_ranks: int) -> np.ndarray:
        """The tokens that a context rank holds, in its order."""
        length = len(self.order_S) // num_ranks
        return self.order_S[rank * length : (rank + 1) * length]


def row_order(microbatch: Microbatch, mesh: Mesh) -> RowOrder:
    """How a packed row is dealt out over the context ranks.

    Raises:
        UserError: the row does not divide.
        ValueError: a document does not, and has to.
    """
    bounds, multiple = microbatch.cu_seqlens.numpy(), mesh.document_multiple
    if mesh.config.context == 1:
        order = np.arange(bounds[-1])
        return RowOrder(order, order)
    if (np.diff(bounds) % multiple).any():
        raise ValueError(f"the lengths of packed documents, {np.diff(bounds)}, are no multiples of {multiple}")
    order = shard_order(bounds, mesh.ring.size() if multiple == 1 else mesh.config.context).ravel()
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return RowOrder(order, place)


def sequence_shards(mesh: Mesh, seq_length: int) -> list[Shard]:
    """Each replica rank's part of a row's embeddings, in the row's dealt order, by rank in the replica."""
    tensor, context = mesh.config.tensor, mesh.config.context
    length = seq_length // context
    shards = []
    for rank in range(mesh.replica.size()):
        stage, c, t = rank // (tensor * context), rank // tensor % context, rank % tensor
        if stage:
            shards.append(Shard(0, 0, False))
        elif splits_sequence(mesh):
            start, part = c * length, length // tensor
            shards.append(Shard(start + t * part, start + (t + 1) * part, True))
        else:
            shards.append(Shard(c * length, (c + 1) * length, t == 0))
    return shards
