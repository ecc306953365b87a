"""What a block kernel is.

Shapes: T query tokens and K key tokens of a block, N query heads, G key/value heads (G divides N), D head width.
"""

from typing import Protocol

import torch
from torch import Tensor

from megamed.ops.ring_plan import Block


class BlockKernel(Protocol):
    """Attention of some queries to some keys, document by document, with what it takes to merge several of them.

    Attributes:
        name: how it is chosen.
    """

    name: str

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why the kernel cannot run here, and what to install or change; None if it can."""

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The attended values [T, N, D], and the log-sum-exp of the scores [N, T] in at least fp32.

        Args:
            q_TND, k_KGD, v_KGD: the last dimension is contiguous, the others need not be.
            block: the documents' bounds, and whether the block is causal.
            scale: of the scores.

        The values may have more precision than q. A block in which every document has queries and keys.
        """

    def backward(
        self,
        dout_TND: Tensor,
        q_TND: Tensor,
        k_KGD: Tensor,
        v_KGD: Tensor,
        out_TND: Tensor,
        lse_NT: Tensor,
        block: Block,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's share of dq [T, N, D], dk and dv [K, G, D].

        Args:
            out_TND, lse_NT: over all the keys that the queries see, in this block or another.
        """
