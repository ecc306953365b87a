"""RoPE and attention over packed documents against Megatron's RoPE and attention over each document alone.

Shapes: T tokens of the packed row, N query heads, G key/value heads, D head width.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor

from megamed.models.language.attention import Packing, RotaryAttention
from megamed.models.language.backends import RingAttend
from megamed.models.language.rotary import RotaryConfig

LENGTHS = (5, 1, 17, 40)
BASE = 1e4


def attention(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, packing: Packing) -> Tensor:
    """The module as Megatron builds and calls it, on one rank."""
    alone: Any = SimpleNamespace(size=lambda: 1)
    mesh: Any = SimpleNamespace(ring=alone, ulysses=alone)
    module = RotaryAttention(None, RotaryConfig(base=BASE), lambda **_: RingAttend(mesh, None))  # type: ignore[arg-type]
    out = module(q_TND, k_TGD, v_TGD, None, packed_seq_params=packing)
    assert out.shape == (len(q_TND), q_TND.shape[1] * q_TND.shape[2])
    return out.view_as(q_TND)


def packing(device: str = "cpu") -> Packing:
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(device)
    return Packing.of_row(torch.tensor([0, *LENGTHS]).cumsum(0), positions)


def draw(heads: int, width: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(sum(LENGTHS), heads, width, generator=torch.Generator().manual_seed(seed))


def megatrons_rope(x_TND: Tensor, bounds: Tensor) -> Tensor:
    width = x_TND.shape[-1]
    frequency = 1 / BASE ** (torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(max(LENGTHS)).float(), frequency).to(x_TND.device)
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    return apply_rotary_pos_emb(x_TND, torch.cat((angle, angle), -1)[:, None, None], config, bounds, cp_group=alone)


def test_layers_of_a_microbatch_share_one_table() -> None:
    packed = packing()
    for _ in range(2):
        attention(draw(4), draw(2), draw(2), packed)
    assert len(packed.tables) == 1


def reference(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
    """Megatron's RoPE, then softmax attention written out, a document at a time."""
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(q_TND.device)
    q_TND, k_TGD = megatrons_rope(q_TND, bounds), megatrons_rope(k_TGD, bounds)
    repeat, parts = q_TND.shape[1] // k_TGD.shape[1], []
    for q, k, v in zip(*(x.split(LENGTHS) for x in (q_TND, k_TGD, v_TGD)), strict=True):
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("snd,tnd->nst", q, k) / q.shape[-1] ** 0.5
        ahead = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
        parts.append(torch.einsum("nst,tnd->snd", scores.masked_fill(ahead, float("-inf")).softmax(-1), v))
    return torch.cat(parts)


def test_attention_stays_within_documents_and_looks_back_only() -> None:
    q, k, v = (draw(heads, seed=seed).requires_grad_() for seed, heads in enumerate((4, 2, 2)))
    found, expected = attention(q, k, v, packing()), reference(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # sums of up to 40 terms, in fp32
    weight = draw(4, seed=5)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-5),  # as above
    (torch.bfloat16, 3e-2),  # 8 bits: one part in 256, through a product and a sum
])  # fmt: skip
def test_attention_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (
        draw(heads, 64, seed).to("cuda", dtype).requires_grad_() for seed, heads in enumerate((4, 2, 2))
    )
    found, expected = attention(q, k, v, packing("cuda")), reference(*(x.float() for x in (q, k, v)))
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    weight = draw(4, 64, 5).cuda()
    for ours, theirs in zip(
        torch.autograd.grad((found.float() * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
