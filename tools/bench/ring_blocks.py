"""The work of all ranks of a zigzag ring in one process, block after block, and one fused call over the same row.

Shapes: S tokens of the row, R ring ranks, T = S / R tokens of a shard, N query heads, G key/value heads (G divides N),
D head width. A log-sum-exp is [N, T]; keys and values of a shard are one tensor kv [2, T, G, D].
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamed.ops.kernels import BlockKernel
from megamed.ops.one_process import by_step
from megamed.ops.ring_attention import SummedGradients, add_to_keys, attend_blocks, halves
from megamed.ops.ring_plan import Block, plan_ring
from megamed.ops.zigzag import shard_order

# Five matrix products for the forward pass's two: the scores are computed a second time. So count the
# FlashAttention papers.
BACKWARD = 2.5


@dataclass(frozen=True)
class Heads:
    """Heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def of_groups(self, num_groups: int) -> "Heads":
        """Some of the key/value heads, with their query heads."""
        return Heads(self.num_heads // self.num_kv_heads * num_groups, num_groups, self.head_dim)


def document_bounds(num_documents: int, length: int) -> np.ndarray:
    """`cu_seqlens` of a packed row whose documents are 1 : 2 : ... : M as long."""
    shares = np.arange(num_documents + 1).cumsum()
    return (shares * length // shares[-1]).astype(np.int32)


def forward_flops(cu_seqlens: np.ndarray, heads: Heads) -> int:
    """FLOPs of causal attention: two products of 2 L L D each, a head and a document of L tokens, and half of it
    is masked. The backward pass has `BACKWARD` times as many."""
    lengths = np.diff(cu_seqlens).astype(object)  # Python's integers, which have no end
    return int((lengths * lengths).sum()) * 2 * heads.head_dim * heads.num_heads


def needed_bytes(length: int, num_ranks: int, heads: Heads, itemsize: int) -> int:
    """Most memory that the tensors of a comparison take, all told.

    Args:
        length: S.
        num_ranks: R.
        heads: of the layer.
        itemsize: bytes of a number of q.
    """
    q, kv = (length * count * heads.head_dim for count in (heads.num_heads, heads.num_kv_heads))
    inputs = (2 * q + 2 * kv) * itemsize * 2  # q, dout, k, v, in the row's order and dealt out
    fused = (2 * q + 2 * kv) * itemsize  # out and gradients
    # flash-attn sums dq in fp32, and writes dk and dv for each query head before it adds those of a group.
    kernel = q * 4 + 2 * q * itemsize
    gradients = 2 * kv * 4  # of all shards, in fp32
    one_rank = q // num_ranks * (3 * 4 + 6 * itemsize)  # partial and merged outputs, dq; chosen q, dout, out
    gathered = 2 * kv * itemsize  # keys and values of one rank's blocks, for the kernels alone
    return inputs + fused + kernel + gradients + one_rank + gathered


@dataclass(frozen=True)
class Row:
    """A packed row's queries, keys, values, and the gradient of its output."""

    cu_seqlens: np.ndarray
    q_SND: Tensor
    k_SGD: Tensor
    v_SGD: Tensor
    dout_SND: Tensor

    @classmethod
    def draw(cls, cu_seqlens: np.ndarray, heads: Heads, dtype: torch.dtype, device: torch.device) -> "Row":
        """Normally distributed numbers, the same in every process."""
        generator = torch.Generator(device).manual_seed(1)
        q, k, v, dout = (
            torch.randn(
                int(cu_seqlens[-1]), count, heads.head_dim, generator=generator, dtype=dtype, device=device
            )
            for count in (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads, heads.num_heads)
        )
        return cls(cu_seqlens, q, k, v, dout)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.q_SND.shape[-1] ** -0.5


class Fused:
    """One call of a block kernel over the whole row."""

    def __init__(self, row: Row, kernel: BlockKernel):
        self.row, self.kernel = row, kernel
        block = plan_ring(row.cu_seqlens, 1, 0, row.q_SND.device).blocks[0]
        assert block is not None
        self.block = block
        self.out_SND: Tensor
        """In q's type."""
        self.lse_NS: Tensor
        self.gradients: list[Tensor] = []
        """Of q, k and v, in q's type."""

    def forward(self) -> None:
        row = self.row
        out, self.lse_NS = self.kernel.forward(row.q_SND, row.k_SGD, row.v_SGD, self.block, row.scale)
        self.out_SND = out.to(row.q_SND.dtype)

    def backward(self) -> None:
        row = self.row
        inputs = row.dout_SND, row.q_SND, row.k_SGD, row.v_SGD, self.out_SND, self.lse_NS
        self.gradients = [x.to(row.q_SND.dtype) for x in self.kernel.backward(*inputs, self.block, row.scale)]


class Ring:
    """All ranks of a ring, each computing what it would in a process of its own, but for the communication.

    Every rank reads the others' keys and values where they are, and adds their gradients where they belong.
    """

    def __init__(self, row: Row, num_ranks: int, kernel: BlockKernel):
        device = row.q_SND.device
        self.num_ranks, self.kernel, self.scale = num_ranks, kernel, row.scale
        self.order_RT = torch.from_numpy(shard_order(row.cu_seqlens, num_ranks)).to(device)
        self.plans = [plan_ring(row.cu_seqlens, num_ranks, rank, device) for rank in range(num_ranks)]
        self.q_RTND, self.dout_RTND = row.q_SND[self.order_RT], row.dout_SND[self.order_RT]
        self.kv_R2TGD = torch.stack((row.k_SGD[self.order_RT], row.v_SGD[self.order_RT]), 1)
        wide = torch.promote_types(row.q_SND.dtype, torch.float32)
        self.dkv_R2TGD = torch.zeros_like(self.kv_R2TGD, dtype=wide)
        """Summed over the backward passes of all ranks since it was last zero."""

    def forward(self, rank: int) -> tuple[Tensor, Tensor]:
        """The forward pass of one rank: its output in q's type, and the log-sum-exp."""
        plan = self.plans[rank]
        arriving = by_step(list(self.kv_R2TGD), plan)
        return attend_blocks(self.q_RTND[rank], arriving, plan, self.kernel, self.scale)

    def backward(self, rank: int, out_TND: Tensor, lse_NT: Tensor) -> Tensor:
        """The backward pass of one rank, in the ring's order; returns dq and adds to `dkv_R2TGD`."""
        q, (k, v) = self.q_RTND[rank], self.kv_R2TGD[rank]
        gradients = SummedGradients(self.dout_RTND[rank], q, out_TND, lse_NT, self.kernel, self.scale)
        (own, _), *others = self._blocks(rank)
        first, rest = halves(k.shape[1])
        dkv_own = torch.zeros_like(self.dkv_R2TGD[rank])
        gradients.add_heads(own, k, v, first, dkv_own)
        for block, j in others:
            parts = gradients.add(block, *block.keys.take(self.kv_R2TGD[j], 1))
            add_to_keys(block, self.dkv_R2TGD[j], parts)
        gradients.add_heads(own, k, v, rest, dkv_own)
        # The rank would now turn its keys' gradient into their type; here other ranks may still add to it.
        self.dkv_R2TGD[rank].add_(dkv_own).to(q.dtype)
        return gradients.dq().to(q.dtype)

    def forward_calls(self, rank: int) -> list[Callable[[], Any]]:
        """The kernel calls alone of `forward`, with what they read gathered beforehand."""
        q = self.q_RTND[rank]
        chosen: dict[int, Tensor] = {}
        calls: list[Callable[[], Any]] = []
        for block, j in self._blocks(rank):
            if id(block.queries) not in chosen:
                chosen[id(block.queries)] = block.queries.take(q)
            k, v = block.keys.take(self.kv_R2TGD[j], 1)
            calls.append(partial(self.kernel.forward, chosen[id(block.queries)], k, v, block, self.scale))
        return calls

    def backward_calls(self, rank: int, out_TND: Tensor, lse_NT: Tensor) -> list[Callable[[], Any]]:
        """The kernel calls alone of `backward`, with what they read gathered beforehand."""
        whole = self.dout_RTND[rank], self.q_RTND[rank], out_TND
        (own, _), *others = self._blocks(rank)
        repeat = whole[1].shape[1] // self.kv_R2TGD.shape[3]
        calls: list[Callable[[], Any]] = []
        for heads in halves(self.kv_R2TGD.shape[3]):
            if heads.stop > heads.start:
                queries = slice(heads.start * repeat, heads.stop * repeat)
                dout, q, out = (x[:, queries] for x in whole)
                k, v = self.kv_R2TGD[rank][:, :, heads]
                calls.append(partial(self.kernel.backward, dout, q, k, v, out, lse_NT[queries], own, self.scale))
        chosen: dict[int, list[Tensor]] = {}
        for block, j in others:
            tokens = block.queries
            if id(tokens) not in chosen:
                chosen[id(tokens)] = [*(tokens.take(x) for x in whole), tokens.take(lse_NT, 1).contiguous()]
            dout, q, out, lse = chosen[id(tokens)]
            k, v = block.keys.take(self.kv_R2TGD[j], 1)
            calls.append(partial(self.kernel.backward, dout, q, k, v, out, lse, block, self.scale))
        return calls

    def _blocks(self, rank: int) -> list[tuple[Block, int]]:
        """A rank's blocks, and whose keys each has."""
        steps = enumerate(self.plans[rank].blocks)
        return [(block, (rank - step) % self.num_ranks) for step, block in steps if block is not None]


def difference(found: Tensor, expected: Tensor) -> float:
    """Length of the difference of two tensors over that of `expected`."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())
