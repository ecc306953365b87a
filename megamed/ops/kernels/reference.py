"""Kernels that run anywhere: plain math, and torch's fused one for the CPU.

Shapes: T query tokens and K key tokens of a block, N query heads, G key/value heads (G divides N), D head width;
of one document, t queries and k keys; X any number of heads.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megamed.ops.ring_plan import Block

# Scores that the math kernel has in memory at once, over all heads: 64 MiB of fp32.
SCORES = 1 << 24


class Math:
    """Scores, softmax and weighted sum written out, some queries at a time: the reference for all others."""

    name = "math"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        num_groups = k_KGD.shape[1]
        by_key = _grouped(k_KGD, num_groups), _grouped(v_KGD, num_groups)
        outs, lses = [], []
        for q, k, v in documents(block, (_grouped(q_TND, num_groups),), by_key):
            for start, rows in _some_rows(q, k.shape[-2]):
                scores = _scores(rows, k, start, block.causal, scale)
                lse = scores.logsumexp(-1, keepdim=True)
                outs.append((scores - lse).exp() @ v)
                lses.append(lse)
        return _by_token(outs), torch.cat(lses, -2).flatten(0, 1)[..., 0]

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
        num_groups = k_KGD.shape[1]
        dout, q, out = (_grouped(x, num_groups) for x in (dout_TND, q_TND, out_TND))
        delta = (dout * out).sum(-1, keepdim=True)
        by_query = torch.cat((q, dout, delta, _grouped(lse_NT.t()[..., None], num_groups)), -1)
        dqs, dks, dvs = [], [], []
        for rows, k, v in documents(block, (by_query,), (_grouped(k_KGD, num_groups), _grouped(v_KGD, num_groups))):
            dk, dv = torch.zeros_like(k), torch.zeros_like(v)
            for start, some in _some_rows(rows, k.shape[-2]):
                q, dout, delta, lse = some.split((q_TND.shape[-1], dout_TND.shape[-1], 1, 1), -1)
                weights = (_scores(q, k, start, block.causal, scale) - lse).exp()
                dscores = weights * (dout @ v.mT - delta) * scale
                dqs.append(dscores @ k)
                # All query heads of a group at once.
                dk += dscores.flatten(1, 2).mT[:, None] @ q.flatten(1, 2)[:, None]
                dv += weights.flatten(1, 2).mT[:, None] @ dout.flatten(1, 2)[:, None]
            dks.append(dk)
            dvs.append(dv)
        return _by_token(dqs), _by_token(dks), _by_token(dvs)


def _scores(q_GXtD: Tensor, k_G1kD: Tensor, start: int, causal: bool, scale: float) -> Tensor:
    """[G, X, t, k]; the first query is the document's token `start`."""
    scores = q_GXtD @ k_G1kD.mT * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(start + 1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    return scores


def _grouped(x_TXD: Tensor, num_groups: int) -> Tensor:
    """[G, X / G, T, D] in fp32 or fp64."""
    return _wide(x_TXD).transpose(0, 1).unflatten(0, (num_groups, -1))


def _by_token(parts: list[Tensor]) -> Tensor:
    """[T, X, D] of parts [G, X / G, t, D]."""
    return torch.cat(parts, -2).flatten(0, 1).transpose(0, 1)


def _some_rows(x_GXtD: Tensor, num_keys: int) -> Iterator[tuple[int, Tensor]]:
    """Queries of a document, as many at a time as `SCORES` allows, and the number of the first."""
    rows = max(1, SCORES // (x_GXtD.shape[0] * x_GXtD.shape[1] * num_keys))
    return ((number * rows, part) for number, part in enumerate(x_GXtD.split(rows, -2)))


class CpuFlash:
    """torch's fused attention for the CPU, a document at a time.

    What is going to be merged is computed in fp32 where the inputs are narrower, so that it is not rounded before.
    """

    name = "cpu_flash"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        # On the meta device it stands for any kernel that keeps no scores.
        fits = device.type in ("cpu", "meta")
        return None if fits else f"runs on the CPU, and the tensors are on {device.type}"

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        q, k, v = (batch(_wide(x) if block.partial and not x.is_meta else x) for x in (q_TND, k_KGD, v_KGD))
        parts = [attend(*inputs, 0.0, block.causal, scale=scale) for inputs in documents(block, (q,), (k, v))]
        outs, lses = zip(*parts, strict=True)
        return unbatch(outs), joined(lses, -1)[0]

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
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = (_wide(x) if block.partial and not x.is_meta else x for x in (dout_TND, q_TND, out_TND, k_KGD, v_KGD))
        dout, q, out, k, v = (batch(x) for x in inputs)
        parts = [
            attend(dout, q, k, v, out, lse[..., 0], 0.0, block.causal, scale=scale)
            for dout, q, out, lse, k, v in documents(block, (dout, q, out, lse_NT[None, ..., None]), (k, v))
        ]
        dqs, dks, dvs = zip(*parts, strict=True)
        return unbatch(dqs), unbatch(dks), unbatch(dvs)


def documents(block: Block, by_query: Sequence[Tensor], by_key: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Each document's part of each tensor; tokens are the last dimension but one.

    Split, not sliced: one call a tensor in place of one a document.
    """
    parts_q = (x.split(block.lengths_q, -2) for x in by_query)
    parts_k = (x.split(block.lengths_k, -2) for x in by_key)
    return zip(*parts_q, *parts_k, strict=True)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The documents' parts in one tensor; without a copy where there is but one document."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def batch(x_TXD: Tensor) -> Tensor:
    """A batch of one, [1, X, T, D]; a view."""
    return x_TXD.transpose(0, 1)[None]


def unbatch(parts: Sequence[Tensor]) -> Tensor:
    """The documents' results [1, X, t, D], which lie token by token, as [T, X, D]."""
    return joined([part.transpose(1, 2) for part in parts], 1)[0]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
