"""What the tests of ring attention are compared with: plain attention over the whole row, in fp64.

Shapes: S tokens of the row, N query heads, G key/value heads (G divides N), D head width.
"""

import numpy as np
import torch
from torch import Tensor

# Rows of 240 tokens, which 1, 2, 3, 4 and 8 divide.
ROWS = {
    "one document": [240],
    "uneven documents": [61, 17, 33, 9, 120],
    "shorter than 2R": [3, 15, 1, 7, 100, 2, 5, 11, 96],
    "single tokens and empty ones": [0, *[1] * 30, 0, 0, 170, *[1] * 40, 0],
}


def bounds(lengths: list[int]) -> np.ndarray:
    """cu_seqlens of documents of these lengths."""
    return np.concatenate([[0], np.cumsum(lengths)])


def random_inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [torch.randn(num_tokens, n, head_dim, generator=generator, dtype=torch.float64).to(dtype) for n in heads]


def whole_row(
    q_SND: Tensor, k_SGD: Tensor, v_SGD: Tensor, dout_SND: Tensor, cu_seqlens: np.ndarray, causal: bool
) -> list[Tensor]:
    """out, dq, dk, dv in fp64, by autograd."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q_SND, k_SGD, v_SGD))
    repeat = q.shape[1] // k.shape[1]
    document_S = torch.from_numpy(np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))).to(q.device)
    visible = document_S[:, None] == document_S
    if causal:
        visible &= torch.ones_like(visible).tril()
    scores = torch.einsum("qnd,knd->nqk", q, k.repeat_interleave(repeat, 1)) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    out = torch.einsum("nqk,knd->qnd", weights, v.repeat_interleave(repeat, 1))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout_SND.double())]


def worst(values: list[Tensor], references: list[Tensor]) -> float:
    """The largest difference, by the largest value of each reference."""
    pairs = zip(values, references, strict=True)
    return max(float((value - ref).abs().max() / ref.abs().max()) for value, ref in pairs)
