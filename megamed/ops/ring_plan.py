"""What each rank of a ring computes at each step: worked out once for a packed row, on the host, for all layers.

At step s of the ring, rank r has the keys and values of rank j = r - s (modulo R). Of each document, both ranks hold
an early and a late chunk (`zigzag.py`). Causally,

    j == r   a rank's own tokens stand in the document's order: one causal block
    j <  r   all queries see j's early chunk, whole, and nothing of its late one
    j >  r   late queries see all of j, early ones nothing

so that every block but the diagonal one needs no mask, and all ranks compute equally much at every step.

Shapes: S tokens of the row, M documents, R ring ranks, T = S / R tokens of a rank's shard.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megamed.ops.zigzag import chunk_lengths


@dataclass(frozen=True, eq=False)
class Tokens:
    """Some tokens of a shard, in ascending order. Equal choices within a plan are one and the same object.

    Attributes:
        start: the first token.
        length: how many.
        index: int64 on the device; None where the tokens are contiguous.
    """

    start: int
    length: int
    index: Tensor | None

    def take(self, x: Tensor, dim: int = 0) -> Tensor:
        """These tokens of `x`: a view where they are contiguous."""
        return x.narrow(dim, self.start, self.length) if self.index is None else x.index_select(dim, self.index)

    def add_to(self, x: Tensor, values: Tensor) -> None:
        """Add to these tokens of `x`, in place, with `x`'s precision; tokens are the first dimension."""
        if self.index is None:
            self.take(x).add_(values)
        else:
            # No token is named twice, so the order of the additions is fixed.
            x.index_add_(0, self.index, values.to(x.dtype))


@dataclass(frozen=True, eq=False)
class Block:
    """One attention call: queries of this rank, keys of one rank, document by document.

    Every document of a block has queries and keys.

    Attributes:
        queries, keys: which tokens of this rank's shard, and of the shard that the keys come from.
        cu_seqlens_q, cu_seqlens_k: the documents' bounds among those tokens, int32 on the device.
        lengths_q, lengths_k: the documents' lengths, on the host.
        max_q, max_k: the longest of them.
        causal: queries and keys are the same tokens, and each sees itself and earlier ones of its document.
        partial: the ring has other ranks, so the result is to be merged with others.
    """

    queries: Tokens
    keys: Tokens
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    max_q: int
    max_k: int
    causal: bool
    partial: bool


@dataclass(frozen=True, eq=False)
class RingPlan:
    """The blocks of one rank.

    Attributes:
        num_ranks, rank: R and r.
        num_tokens: T, of this rank's shard.
        num_documents: of the row, empty ones not counted.
        blocks: by step; None where nothing is visible.
    """

    num_ranks: int
    rank: int
    num_tokens: int
    num_documents: int
    blocks: tuple[Block | None, ...]


def plan_ring(
    cu_seqlens: np.ndarray, num_ranks: int, rank: int, device: torch.device | str = "cpu", causal: bool = True
) -> RingPlan:
    """Plan the ring attention of one packed row.

    Args:
        cu_seqlens: [M + 1], the documents' bounds in the row, from 0 to S; documents may be empty.
        num_ranks: R; must divide S.
        rank: r, of this process.
        device: where the attention runs. Everything it needs goes there in one transfer.
        causal: whether a token sees only itself and earlier tokens of its document, or all of them.

    Raises:
        UserError: R does not divide S.
    """
    lengths = chunk_lengths(cu_seqlens, num_ranks)
    early, late = lengths[:, :num_ranks], lengths[:, ::-1][:, :num_ranks]
    both = early + late
    starts = both.cumsum(0) - both
    upload = _Upload()
    drafts = []
    for step in range(num_ranks):
        j = (rank - step) % num_ranks
        queries, keys = (starts[:, rank], both[:, rank]), (starts[:, j], both[:, j])
        if causal and j < rank:
            keys = (starts[:, j], early[:, j])
        if causal and j > rank:
            queries = (starts[:, rank] + early[:, rank], late[:, rank])
        drafts.append(_draft(queries, keys, upload))
    sent = upload.send(device)
    chosen: dict[_Choice, Tokens] = {}
    blocks = tuple(
        None if draft is None else _block(draft, sent, chosen, causal and step == 0, num_ranks > 1)
        for step, draft in enumerate(drafts)
    )
    num_documents = int(np.count_nonzero(np.diff(cu_seqlens)))
    return RingPlan(num_ranks, rank, int(cu_seqlens[-1]) // num_ranks, num_documents, blocks)


_Spans = tuple[np.ndarray, np.ndarray]  # each document's first token in a shard, and its number of tokens
_Choice = tuple[int, int, int | None]  # start, length and index of Tokens, the index by its number in the upload
_Draft = tuple[_Choice, _Choice, int, int, np.ndarray, np.ndarray]


def _draft(queries: _Spans, keys: _Spans, upload: "_Upload") -> _Draft | None:
    kept = np.flatnonzero((queries[1] > 0) & (keys[1] > 0))
    if not len(kept):
        return None
    choices = [_choose(starts[kept], lengths[kept], upload) for starts, lengths in (queries, keys)]
    lengths_q, lengths_k = queries[1][kept], keys[1][kept]
    bounds = [upload.add(np.concatenate([[0], x.cumsum()]).astype(np.int32)) for x in (lengths_q, lengths_k)]
    return choices[0], choices[1], bounds[0], bounds[1], lengths_q, lengths_k


def _choose(starts: np.ndarray, lengths: np.ndarray, upload: "_Upload") -> _Choice:
    ends = lengths.cumsum()
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return int(starts[0]), int(ends[-1]), None
    index = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    return int(starts[0]), int(ends[-1]), upload.add(index)


def _block(draft: _Draft, sent: list[Tensor], chosen: dict[_Choice, Tokens], causal: bool, partial: bool) -> Block:
    *choices, bounds_q, bounds_k, lengths_q, lengths_k = draft
    tokens = []
    for choice in choices:
        start, length, index = choice
        if choice not in chosen:
            chosen[choice] = Tokens(start, length, None if index is None else sent[index])
        tokens.append(chosen[choice])
    return Block(
        tokens[0],
        tokens[1],
        sent[bounds_q],
        sent[bounds_k],
        tuple(lengths_q.tolist()),
        tuple(lengths_k.tolist()),
        int(lengths_q.max()),
        int(lengths_k.max()),
        causal,
        partial,
    )


class _Upload:
    """Integer arrays that travel to the device together; equal ones travel once."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._known: dict[tuple[str, bytes], int] = {}

    def add(self, array: np.ndarray) -> int:
        key = (array.dtype.str, array.tobytes())
        if key not in self._known:
            self._known[key] = len(self._arrays)
            self._arrays.append(array)
        return self._known[key]

    def send(self, device: torch.device | str) -> list[Tensor]:
        """The arrays on the device, as they were numbered by `add`."""
        # The wide ones first, so that each stands at a multiple of its width.
        order = sorted(range(len(self._arrays)), key=lambda number: -self._arrays[number].itemsize)
        joined = bytearray(b"".join(self._arrays[number].tobytes() for number in order))
        data = torch.frombuffer(joined, dtype=torch.uint8)
        if torch.device(device).type == "cuda":
            data = data.pin_memory()  # without which the copy waits for the GPU
        data = data.to(device, non_blocking=True)
        sent: dict[int, Tensor] = {}
        pieces = data.split([self._arrays[number].nbytes for number in order])
        for number, piece in zip(order, pieces, strict=True):
            sent[number] = piece.view(torch.int64 if self._arrays[number].itemsize == 8 else torch.int32)
        return [sent[number] for number in range(len(self._arrays))]
