"""What on a GPU is one kernel, and elsewhere several operations: attention, RMSNorm, SwiGLU.

On the meta device nothing has to be computed, so functions stand here for such kernels that allocate, keep and read
what the kernels do, and no more: torch's RMSNorm for CUDA and Megatron's compiled SwiGLU keep their input alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.fusions import fused_bias_swiglu
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x + 0  # reads x, writes as much

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return x + grad, weight + 0


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, *_: Any) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return gate + up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        return torch.cat([grad, grad], dim=-1).add_(gate_up), None, None


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device torch would take attention that keeps all scores, as no other device does."""
    original = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Tensor:
        if not q.is_meta or others:
            return original(q, k, v, **others)
        fused: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
        return fused

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


@contextmanager
def gpu_kernels(modules: Sequence[nn.Module]) -> Iterator[None]:
    """RMSNorm and SwiGLU as on a GPU, in models on the meta device.

    Args:
        modules: Megatron's, whose settings say whether SwiGLU is compiled.
    """

    def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
        return _RMSNorm.apply(x, weight)

    for module in modules:
        module.config.bias_activation_fusion = True  # type: ignore[union-attr]
    with (
        mock.patch.object(F, "rms_norm", rms_norm),
        mock.patch.object(fused_bias_swiglu, "SwiGLUFunction", _SwiGLU),
    ):
        yield
