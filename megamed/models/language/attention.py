"""The core-attention module of the layer spec: rotary positions, then attention over packed documents.

Shapes: T tokens of the packed row that this rank holds, N query heads, G key/value heads (G divides N), D head width.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamed.models.language.rotary import RotaryConfig, rotary_table, rotate
from megamed.ops.ring_plan import RingPlan, plan_ring
from megamed.runtime import current_device


@dataclass
class Packing(PackedSeqParams):
    """What the layers are told of a packed row: Megatron's bounds of the documents, and this rank's part of it."""

    position_T: Tensor | None = None
    """Position of each of this rank's tokens in its document."""
    plan: RingPlan | None = None
    """What this rank computes at each step of the ring."""
    labelled_N: Tensor | None = None
    """Which of this rank's tokens have a label; on the host, so that nobody has to ask a GPU for their number."""
    tables: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Rotary tables, which every layer of a microbatch asks for again."""

    @classmethod
    def of_row(
        cls, cu_seqlens: Tensor, position_T: Tensor | None = None, ring_size: int = 1, ring_rank: int = 0
    ) -> "Packing":
        """Describe a packed row.

        Args:
            cu_seqlens: the documents' bounds in the whole row, starting with 0; on the host.
            position_T: positions of the tokens that this rank holds, on its device; None for the whole row in order.
            ring_size: ranks that blocks of keys and values go round over.
            ring_rank: this rank among them.
        """
        lengths = cu_seqlens.diff()
        if position_T is None:
            position_T = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(current_device())
        bounds, longest = cu_seqlens.int().to(position_T.device), int(lengths.max())
        return cls(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_T=position_T,
            plan=plan_ring(cu_seqlens.numpy(), ring_size, ring_rank, position_T.device),
        )


class Attend(Protocol):
    """Softmax attention in which a token sees itself and earlier tokens of its own document."""

    def __call__(self, q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: Packing) -> Tensor: ...


class BuildAttend(Protocol):
    """Makes one layer's `Attend` from what Megatron gives its core attention's constructor."""

    def __call__(self, config: TransformerConfig, **kwargs: Any) -> Attend: ...


class RotaryAttention(nn.Module):
    """RoPE and an attention backend, with the constructor and call that Megatron's attention layer expects.

    Megatron's own RoPE goes through a packed row document by document, in every layer and once for queries
    and once for keys, and knows one layout over context ranks only.
    """

    def __init__(self, config: TransformerConfig, rotary: RotaryConfig, build: BuildAttend, **kwargs: Any):
        super().__init__()
        self.rotary = rotary
        self.attend = build(config=config, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """q [T, N, D], k and v [T, G, D], not yet rotated, to [T, N * D]."""
        packing = packed_seq_params
        assert packing is not None and packing.position_T is not None, "megamed packs every batch"
        kind = (query.shape[-1], query.dtype)
        if kind not in packing.tables:
            packing.tables[kind] = rotary_table(packing.position_T, query.shape[-1], self.rotary, query.dtype)
        cos_T1D, sin_T1D = packing.tables[kind]
        query, key = rotate(query, cos_T1D, sin_T1D), rotate(key, cos_T1D, sin_T1D)
        return self.attend(query, key, value, packing).flatten(1)
