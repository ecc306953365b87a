"""The adapters to kernels that need a GPU, without one: the calls of flash-attn by stand-ins with its signatures, of
torch's by the shapes that they return on the meta device.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from whole_row import ROWS, bounds, random_inputs

from megamed.ops.kernels import KERNELS
from megamed.ops.ring_plan import Block, RingPlan, Tokens, plan_ring

MATH = KERNELS["math"]


def _block(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool) -> Block:
    lengths_q, lengths_k = (tuple(x.diff().tolist()) for x in (cu_q, cu_k))
    assert cu_q.dtype == cu_k.dtype == torch.int32 and (max_q, max_k) == (max(lengths_q), max(lengths_k))
    everything = [Tokens(0, sum(lengths), None) for lengths in (lengths_q, lengths_k)]
    return Block(*everything, cu_q, cu_k, lengths_q, lengths_k, max_q, max_k, causal, True)


def _fill(grads: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for grad, value in zip(grads, values, strict=True):
        assert grad.is_contiguous()
        grad.copy_(value)


# flash-attn 2.8
def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
):  # fmt: skip
    assert dropout_p == 0.0
    block = _block(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return *MATH.forward(q, k, v, block, softmax_scale), torch.empty(0), torch.empty(2)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    rng_state=None, zero_tensors=False,
):  # fmt: skip
    assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
    assert alibi_slopes is None and deterministic is torch.are_deterministic_algorithms_enabled()
    block = _block(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    _fill((dq, dk, dv), MATH.backward(dout, q, k, v, out, softmax_lse, block, softmax_scale))


# flash-attn 3
def _flash_attn_forward(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
    leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
):  # fmt: skip
    block = _block(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return *MATH.forward(q, k, v, block, softmax_scale), None, None


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert sequed_q is None and sequed_k is None and deterministic is torch.are_deterministic_algorithms_enabled()
    block = _block(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal)
    _fill((dq, dk, dv), MATH.backward(dout, q, k, v, out, softmax_lse, block, softmax_scale))


# flash-attn 4
def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, return_lse=False,
):  # fmt: skip
    assert return_lse
    block = _block(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return *MATH.forward(q, k, v, block, softmax_scale), None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
):  # fmt: skip
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    block = _block(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    return MATH.backward(dout, q, k, v, out, lse, block, softmax_scale)


PACKAGES = {
    "flash_attn.flash_attn_interface": SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    ),
    "flash_attn_interface": SimpleNamespace(
        _flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward
    ),
    "flash_attn.cute.interface": SimpleNamespace(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd),
}


def _both_passes(name: str, plan: RingPlan, device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[Any]:
    """Results of all blocks of a rank, by the kernel."""
    kernel, results = KERNELS[name], []
    q, k, v, dout = (x.to(device) for x in random_inputs(plan.num_tokens, 4, 2, 16, dtype=dtype))
    for block in plan.blocks:
        assert block is not None
        chosen_q, chosen_dout = block.queries.take(q), block.queries.take(dout)
        keys = block.keys.take(k), block.keys.take(v)
        out, lse = kernel.forward(chosen_q, *keys, block, 0.3)
        results += [out, lse, *kernel.backward(chosen_dout, chosen_q, *keys, out, lse, block, 0.3)]
    return results


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "flash_attn_4"])
def test_flash_attn_is_called_rightly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamed.ops.kernels.cuda.optional_import", PACKAGES.get)
    for causal in (True, False):
        plan = plan_ring(bounds(ROWS["uneven documents"]), 4, 1, causal=causal)
        for value, expected in zip(_both_passes(name, plan), _both_passes("math", plan), strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ["torch_flash", "cudnn"])
def test_torch_kernels_are_called_rightly(name: str) -> None:
    for causal in (True, False):
        arguments = bounds(ROWS["uneven documents"]), 4, 1
        on_meta = _both_passes(name, plan_ring(*arguments, "meta", causal), "meta", torch.bfloat16)
        expected = _both_passes("math", plan_ring(*arguments, causal=causal))
        assert [value.shape for value in on_meta] == [value.shape for value in expected]
        assert {value.dtype for value in on_meta[1::5]} == {torch.float32}
