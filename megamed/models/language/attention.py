"""Rotary positions and causal attention over packed documents: the core-attention module of the layer spec.

Shapes: T tokens of the packed row, N query heads, G key/value heads (G divides N), X either; D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def rotary_table(packing: PackedSeqParams, like_TXD: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (Su et al., 2021, arXiv:2104.09864), positions counted in each document.

    Args:
        packing: `cu_seqlens_q` are the documents' bounds, starting with 0 and ending with T.
        like_TXD: what is to be rotated; only its sizes, type and device count.
        base: the longest wavelength over 2 pi.

    Returns:
        Two tensors [T, 1, D] for `rotate`: the halves of the cosines are equal, those of the sines opposite.
        They are kept with the packing, since every layer of a microbatch asks for the same ones.
    """
    known = vars(packing)
    if "rotary_table" not in known:
        bounds, device = packing.cu_seqlens_q, like_TXD.device
        num_tokens, _, head_dim = like_TXD.shape
        index_T = torch.arange(num_tokens, dtype=bounds.dtype, device=device)
        # Without a wait for the GPU: the bounds' values are not looked at on the host.
        document_T = torch.searchsorted(bounds[1:], index_T, right=True)
        position_T = (index_T - bounds[document_T]).float()
        frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
        angle = torch.outer(position_T, frequency)[:, None]
        cos, sin = angle.cos().to(like_TXD.dtype), angle.sin().to(like_TXD.dtype)
        known["rotary_table"] = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return known["rotary_table"]


def rotate(x_TXD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D / 2]) by its position's angle; arguments from `rotary_table`."""
    return torch.addcmul(x_TXD * cos_T1D, x_TXD.roll(x_TXD.shape[-1] // 2, -1), sin_T1D)


def packed_causal_attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: PackedSeqParams) -> Tensor:
    """Softmax attention in which a token sees itself and earlier tokens of its own document.

    Args:
        q_TND, k_TGD, v_TGD: queries, keys, values; grouped-query attention where G < N.
        packing: `cu_seqlens_q` are the documents' bounds, starting with 0 and ending with T;
            `max_seqlen_q` is the longest document.

    Returns:
        The attended values, [T, N, D].
    """
    if q_TND.is_cuda and q_TND.dtype != torch.float32:
        # torch's variable-length flash attention needs no loop, hence no wait for the bounds' values.
        # It has no fp32 kernel.
        from torch.nn.attention.varlen import varlen_attn

        repeat = q_TND.shape[1] // k_TGD.shape[1]
        k_TND, v_TND = k_TGD.repeat_interleave(repeat, 1), v_TGD.repeat_interleave(repeat, 1)
        bounds, longest = packing.cu_seqlens_q, packing.max_seqlen_q
        out = varlen_attn(q_TND, k_TND, v_TND, bounds, bounds, longest, longest, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out
    lengths = packing.cu_seqlens_q.diff().tolist()
    parts = []
    # Split, not sliced: the backward pass of a slice fills a gradient of the whole row's size.
    for q, k, v in zip(*(x.split(lengths) for x in (q_TND, k_TGD, v_TGD)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


class PackedCausalAttention(nn.Module):
    """RoPE and `packed_causal_attention`, with the constructor and call that Megatron's attention layer expects.

    Megatron's own RoPE goes through a packed row document by document, in every layer and once for queries
    and once for keys, and on a GPU waits for the bounds each time.
    """

    def __init__(self, config: TransformerConfig, rotary_base: float, **_: Any):
        super().__init__()
        self.rotary_base = rotary_base

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
        """q [T, N, D], k and v [T, G, D], not yet rotated, to [T, N * D]."""
        assert packed_seq_params is not None, "megamed packs every batch"
        cos, sin = rotary_table(packed_seq_params, query, self.rotary_base)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return packed_causal_attention(query, key, value, packed_seq_params).flatten(1)
