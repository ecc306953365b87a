"""Kernels for NVIDIA GPUs: those inside torch, and Tri Dao's flash-attn packages, versions 2, 3 and 4.

All of them work in fp16 or bf16, accumulate in fp32 and round their partial results to the inputs' type. flash-attn's
take all documents in one launch, by their bounds; cuDNN's takes one after the other.

Shapes: T query tokens and K key tokens of a block, N query heads, G key/value heads (G divides N), D head width.
"""

from types import ModuleType

import torch
from torch import Tensor

from megamed.ops.kernels.reference import batch, documents, joined, unbatch
from megamed.ops.ring_plan import Block
from megamed.utils.optional import optional_import


class TorchFlash:
    """flash-attn 2 as it comes with torch."""

    name = "torch_flash"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return _unfit(device, dtype, head_dim, (8, 0), 256)

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        bounds = block.cu_seqlens_q, block.cu_seqlens_k, block.max_q, block.max_k
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q_TND, k_KGD, v_KGD, *bounds, 0.0, block.causal, False, scale=scale
        )
        return out, lse

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
        bounds = block.cu_seqlens_q, block.cu_seqlens_k, block.max_q, block.max_k
        # The random state counts for dropout alone.
        state = torch.empty(2, dtype=torch.uint64, device=q_TND.device)
        unused = torch.empty(0, device=q_TND.device)
        return torch.ops.aten._flash_attention_backward(
            dout_TND, q_TND, k_KGD, v_KGD, out_TND, lse_NT, *bounds, 0.0, block.causal, state, unused, scale=scale
        )


class Cudnn:
    """cuDNN's attention as it comes with torch. It plans anew, tens of milliseconds, for every length it meets."""

    name = "cudnn"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if (why := _unfit(device, dtype, head_dim, (8, 0), 128)) is not None:
            return why
        return None if torch.backends.cudnn.is_available() else "needs a torch that is built with cuDNN"

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        inputs = documents(block, (batch(q_TND),), (batch(k_KGD), batch(v_KGD)))
        parts = [attend(*qkv, None, True, 0.0, block.causal, False, scale=scale)[:2] for qkv in inputs]
        outs, lses = zip(*parts, strict=True)
        return unbatch(outs), joined([lse.flatten(2) for lse in lses], 2)[0]

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
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        state = torch.empty((), dtype=torch.int64, device=q_TND.device)  # counts for dropout alone
        # torch's cache of cuDNN's plans goes by the layout of q, k and v alone: these three must always have the same.
        by_query = batch(q_TND), batch(dout_TND.contiguous()), batch(out_TND.contiguous()), lse_NT[None, ..., None]
        parts = []
        for q, dout, out, lse, k, v in documents(block, by_query, (batch(k_KGD), batch(v_KGD))):
            rest = state, state, None, None, None, q.shape[2], k.shape[2], 0.0, block.causal
            parts.append(attend(dout, q, k, v, out, lse.contiguous(), *rest, scale=scale))
        dqs, dks, dvs = zip(*parts, strict=True)
        return unbatch(dqs), unbatch(dks), unbatch(dvs)


class FlashAttn2:
    """flash-attn 2, the package."""

    name = "flash_attn"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if (why := _unfit(device, dtype, head_dim, (8, 0), 256)) is not None:
            return why
        if (package := optional_import("flash_attn.flash_attn_interface")) is None:
            return "needs flash-attn; install it with: pip install --no-build-isolation flash-attn"
        version = optional_import("flash_attn").__version__  # type: ignore[union-attr]
        if tuple(int(part) for part in version.split(".")[:2]) < (2, 7):
            return f"needs flash-attn 2.7 or newer, and {package.__name__} is of {version}"
        return None

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        bounds = block.cu_seqlens_q, block.cu_seqlens_k, block.max_q, block.max_k
        package = _module("flash_attn.flash_attn_interface")
        out, lse, *_ = package._flash_attn_varlen_forward(q_TND, k_KGD, v_KGD, *bounds, 0.0, scale, block.causal)
        return out, lse

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
        bounds = block.cu_seqlens_q, block.cu_seqlens_k, block.max_q, block.max_k
        dq, dk, dv = _like(q_TND, k_KGD, v_KGD)
        inputs = dout_TND, q_TND, k_KGD, v_KGD, out_TND, lse_NT, dq, dk, dv
        window, softcap, slopes = (-1, -1), 0.0, None
        _module("flash_attn.flash_attn_interface")._flash_attn_varlen_backward(
            *inputs, *bounds, 0.0, scale, block.causal, *window, softcap, slopes, _deterministic()
        )
        return dq, dk, dv


class FlashAttn3:
    """flash-attn 3, for Hopper."""

    name = "flash_attn_3"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if (why := _unfit(device, dtype, head_dim, (9, 0), 256)) is not None:
            return why
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "is for Hopper GPUs (compute capability 9.0); for newer ones there is flash_attn_4"
        if optional_import("flash_attn_interface") is None:
            return "needs flash-attn 3; install it from the folder hopper/ of https://github.com/Dao-AILab/flash-attention"
        return None

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _module("flash_attn_interface")._flash_attn_forward(
            q_TND, k_KGD, v_KGD, **_bounds(block), softmax_scale=scale, causal=block.causal
        )
        return out, lse

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
        dq, dk, dv = _like(q_TND, k_KGD, v_KGD)
        used = None, None  # of each document, where that is not all
        bounds = block.cu_seqlens_q, block.cu_seqlens_k, *used, block.max_q, block.max_k
        # By position as far as that goes: the name of the causal flag has changed between releases.
        inputs = dout_TND, q_TND, k_KGD, v_KGD, out_TND, lse_NT, *bounds, dq, dk, dv, scale, block.causal
        _module("flash_attn_interface")._flash_attn_backward(*inputs, deterministic=_deterministic())
        return dq, dk, dv


class FlashAttn4:
    """flash-attn 4 (CuTe), for Hopper and Blackwell."""

    name = "flash_attn_4"

    def unavailable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        if (why := _unfit(device, dtype, head_dim, (9, 0), 128)) is not None:
            return why
        if optional_import("flash_attn.cute.interface") is None:
            return "needs flash-attn 4; install it with: pip install --pre flash-attn-4"
        return None

    def forward(
        self, q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor, block: Block, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _module("flash_attn.cute.interface")._flash_attn_fwd(
            q_TND, k_KGD, v_KGD, **_bounds(block), softmax_scale=scale, causal=block.causal, return_lse=True
        )
        return out, lse

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
        inputs = q_TND, k_KGD, v_KGD, out_TND, dout_TND, lse_NT, scale, block.causal
        dq, dk, dv, *_ = _module("flash_attn.cute.interface")._flash_attn_bwd(
            *inputs, **_bounds(block), deterministic=_deterministic()
        )
        return dq, dk, dv


def _unfit(
    device: torch.device, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], widest: int
) -> str | None:
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU, and the tensors are on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"works in fp16 or bf16, not in {dtype}"
    if head_dim % 8 or head_dim > widest:
        return f"takes heads of up to {widest} in steps of 8, and these have {head_dim}"
    if (found := torch.cuda.get_device_capability(device)) < capability:
        return f"needs a GPU of compute capability {capability[0]}.{capability[1]}, and this has {found[0]}.{found[1]}"
    return None


def _module(name: str) -> ModuleType:
    module = optional_import(name)
    assert module is not None, "asked for a kernel without asking whether it is available"
    return module


def _bounds(block: Block) -> dict[str, Tensor | int]:
    return {
        "cu_seqlens_q": block.cu_seqlens_q,
        "cu_seqlens_k": block.cu_seqlens_k,
        "max_seqlen_q": block.max_q,
        "max_seqlen_k": block.max_k,
    }


def _like(q_TND: Tensor, k_KGD: Tensor, v_KGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous tensors to be filled."""
    q, k, v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_KGD, v_KGD))
    return q, k, v


def _deterministic() -> bool:
    """The slower backward that adds up in a fixed order, where the program asks for it."""
    return torch.are_deterministic_algorithms_enabled()
