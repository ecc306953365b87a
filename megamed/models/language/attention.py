"""Causal attention over packed documents, the core-attention module of the layer spec.

Shapes: T tokens of the packed row, N query heads, G key/value heads (G divides N), D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def packed_causal_attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: PackedSeqParams) -> Tensor:
    """Softmax attention in which a token sees itself and earlier tokens of its own document.

    Args:
        q_TND, k_TGD, v_TGD: queries, keys, values; grouped-query attention where G < N.
        packing: `cu_seqlens_q` are the documents' bounds, starting with 0 and ending with T;
            `max_seqlen_q` is the longest document.

    Returns:
        The attended values, [T, N, D].
    """
    if q_TND.is_cuda and q_TND.dtype in (torch.bfloat16, torch.float16):
        # torch's variable-length flash attention needs no loop, hence no wait for the bounds' values.
        from torch.nn.attention.varlen import varlen_attn

        repeat = q_TND.shape[1] // k_TGD.shape[1]
        k_TND, v_TND = k_TGD.repeat_interleave(repeat, 1), v_TGD.repeat_interleave(repeat, 1)
        bounds, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        out = varlen_attn(q_TND, k_TND, v_TND, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out
    bounds = packing.cu_seqlens_q.tolist()
    parts = []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if end > start:
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (q_TND, k_TGD, v_TGD))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


class PackedCausalAttention(nn.Module):
    """`packed_causal_attention` with the constructor and call that Megatron's attention layer expects."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
    ):
        super().__init__()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """q [T, N, D], k and v [T, G, D] to [T, N * D]."""
        assert packed_seq_params is not None, "megamed packs every batch"
        return packed_causal_attention(query, key, value, packed_seq_params).flatten(1)
