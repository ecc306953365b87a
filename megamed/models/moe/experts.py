"""The experts of one rank, computed together.

Megatron's `SequentialMLP` runs one small MLP after the other, each with a graph of its own, and joins their results by
a copy. Here all of them are one function with its own backward: products go straight into their rows of one result,
SwiGLU and the tokens' weights are computed over several experts at once in pieces that stay in the cache, gradients of
weights are added to where Megatron's DDP keeps them without existing by themselves, and of what lies between tokens and
results only the first products are kept.

Shapes: N tokens as a dispatcher hands them over, sorted by expert; E experts of this rank; H hidden size; F width of
an expert, of the part of it that this rank has; G tokens of a few experts, or of a piece of those.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# On a CPU, elements [G, F] that a core takes at once: of a piece, which stays in its cache between one operation and
# the next, and of experts that are taken together because each alone has few tokens. A GPU takes all at once.
_PIECE, _GROUP = 2**16, 2**19


class BatchedExperts(SequentialMLP):
    """Megatron's `SequentialMLP`, its parameters and their names in checkpoints, computed together.

    Experts that are not Megatron's own linear layers with SwiGLU between them and no bias, Megatron computes itself.
    Under Megatron's DDP, `overlap_grad_reduce` has to be off: DDP then refuses weights without a `grad`.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Send each token through its expert.

        Args:
            permuted_local_hidden_states: [N, H], sorted by expert.
            tokens_per_expert: [E], how many of them each expert has.
            permuted_probs: [N], the weight of each token's result, fp32.

        Returns:
            Results [N, H] in the type of the hidden states; with expert tensor parallelism, this rank's share of them,
            which the dispatcher sums. And None: there is no bias.
        """
        if not self._is_plain():
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        fc1 = [expert.linear_fc1.weight for expert in self.local_experts]
        fc2 = [expert.linear_fc2.weight for expert in self.local_experts]
        counts = tokens_per_expert.tolist()
        return _Experts.apply(permuted_local_hidden_states, permuted_probs, counts, *fc1, *fc2), None

    def _is_plain(self) -> bool:
        config = self.config
        return (
            config.gated_linear_unit
            and config.activation_func is F.silu
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not (config.add_bias_linear or config.fp8 or config.fp4 or config.use_te_activation_func)
            and not (config.moe_apply_probs_on_input or config.activation_func_fp8_input_store)
            and all(_is_plain_module(module) for expert in self.local_experts for module in expert.modules())
        )


def batched(experts: Any) -> Any:
    """A layer spec's experts: `BatchedExperts` for Megatron's `SequentialMLP`, and others, like grouped ones, as is.

    Args:
        experts: a `ModuleSpec` in megatron-core 0.16, a `functools.partial` in 0.19.
    """
    if isinstance(experts, partial) and experts.func is SequentialMLP:
        return partial(BatchedExperts, *experts.args, **experts.keywords)
    if isinstance(experts, ModuleSpec) and experts.module is SequentialMLP:
        return replace(experts, module=BatchedExperts)
    return experts


def _is_plain_module(module: nn.Module) -> bool:
    """Whether to call it is what is done here: nobody put an adapter in its place or waits for the call."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) in (MLP, ColumnParallelLinear, RowParallelLinear) and not any(hooks)


@dataclass(frozen=True)
class _Group:
    """Neighbouring experts whose tokens element-wise work takes together."""

    experts: range
    rows: slice
    counts: list[int]


def _groups(counts: list[int], width: int, device: torch.device) -> list[_Group]:
    most = max(_GROUP * torch.get_num_threads() // width, 1) if device.type == "cpu" else sum(counts)
    bounds, size = [0], 0
    for expert, count in enumerate(counts):
        if size and size + count > most:
            bounds.append(expert)
            size = 0
        size += count
    bounds.append(len(counts))
    groups, start = [], 0
    for first, last in zip(bounds, bounds[1:], strict=False):
        stop = start + sum(counts[first:last])
        groups.append(_Group(range(first, last), slice(start, stop), counts[first:last]))
        start = stop
    return groups


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all tensors together, as many at a time as stay in the cache; the last tensor is [G, F]."""
    num_rows, width = tensors[-1].shape
    most = max(_PIECE * torch.get_num_threads() // width, 1)
    if num_rows <= most or tensors[-1].device.type != "cpu":
        return iter([tensors])
    return zip(*(tensor.split(most) for tensor in tensors), strict=True)


class _Experts(torch.autograd.Function):
    """Hidden states, weights of tokens, and fc1 and fc2 of all experts, to results."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, probs_N: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        fc1, fc2 = weights[: len(counts)], weights[len(counts) :]
        width = fc2[0].shape[1]
        gate_up_N2F, y_NH = x_NH.new_empty(len(x_NH), 2 * width), x_NH.new_empty(len(x_NH), fc2[0].shape[0])
        xs, gate_ups, ys = x_NH.split(counts), gate_up_N2F.split(counts), y_NH.split(counts)
        groups = _groups(counts, width, x_NH.device)
        scratch_GF = x_NH.new_empty(max(sum(group.counts) for group in groups), width)
        for group in groups:
            act_GF = scratch_GF[: sum(group.counts)]
            for expert in group.experts:
                torch.mm(xs[expert], fc1[expert].t(), out=gate_ups[expert])
            _swiglu(gate_up_N2F[group.rows], probs_N[group.rows, None], act_GF)
            for expert, act in zip(group.experts, act_GF.split(group.counts), strict=True):
                torch.mm(act, fc2[expert].t(), out=ys[expert])
        ctx.counts = counts
        ctx.save_for_backward(x_NH, probs_N, gate_up_N2F, *weights)
        return y_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_NH: Tensor) -> tuple[Tensor | None, ...]:
        x_NH, probs_N, gate_up_N2F, *weights = ctx.saved_tensors
        counts, needs_x, needs_weight = ctx.counts, ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        fc1, fc2 = weights[: len(counts)], weights[len(counts) :]
        width = fc2[0].shape[1]
        groups = _groups(counts, width, x_NH.device)
        most = max(sum(group.counts) for group in groups)
        scratch_2GF, scratch_G2F = x_NH.new_empty(2, most, width), x_NH.new_empty(most, 2 * width)
        grad_x_NH, grad_probs_N = torch.empty_like(x_NH) if needs_x else None, torch.empty_like(probs_N)
        xs, grad_ys = x_NH.split(counts), grad_y_NH.split(counts)
        grad_xs = grad_x_NH.split(counts) if grad_x_NH is not None else ()
        grads: list[Tensor | None] = [None] * len(weights)
        for group in groups:
            size = sum(group.counts)
            grad_act_GF, act_GF, grad_gate_up_G2F = scratch_2GF[0, :size], scratch_2GF[1, :size], scratch_G2F[:size]
            for expert, grad_act in zip(group.experts, grad_act_GF.split(group.counts), strict=True):
                torch.mm(grad_ys[expert], fc2[expert], out=grad_act)
            _swiglu_backward(
                gate_up_N2F[group.rows], probs_N[group.rows, None], act_GF, grad_probs_N[group.rows], grad_gate_up_G2F,
                grad_act_GF,
            )
            acts, grad_gate_ups = act_GF.split(group.counts), grad_gate_up_G2F.split(group.counts)
            for expert, act, grad_gate_up in zip(group.experts, acts, grad_gate_ups, strict=True):
                if needs_weight[len(counts) + expert]:
                    grads[len(counts) + expert] = _weight_gradient(fc2[expert], grad_ys[expert], act)
                if needs_x:
                    torch.mm(grad_gate_up, fc1[expert], out=grad_xs[expert])
                if needs_weight[expert]:
                    grads[expert] = _weight_gradient(fc1[expert], grad_gate_up, xs[expert])
        return grad_x_NH, grad_probs_N, None, *grads


def _swiglu(gate_up_G2F: Tensor, probs_G1: Tensor, act_GF: Tensor) -> None:
    """act = silu(gate) * up * probs, rounded where Megatron's MLP rounds."""
    for gate_up, probs, act in _pieces(gate_up_G2F, probs_G1, act_GF):
        gate, up = gate_up.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=act)
        act.mul_(up).mul_(probs)


def _swiglu_backward(
    gate_up_G2F: Tensor,
    probs_G1: Tensor,
    act_GF: Tensor,
    grad_probs_G: Tensor,
    grad_gate_up_G2F: Tensor,
    grad_act_GF: Tensor,
) -> None:
    """Compute act again and gradients; the gradient of act is spoilt."""
    everything = (gate_up_G2F, probs_G1, act_GF, grad_probs_G, grad_gate_up_G2F, grad_act_GF)
    for gate_up, probs, act, grad_probs, grad_gate_up, grad_act in _pieces(*everything):
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        torch.mul(silu, up, out=act)
        torch.sum(grad_act.to(grad_probs.dtype) * act, dim=-1, out=grad_probs)
        act.mul_(probs)
        grad_act.mul_(probs)
        torch.mul(grad_act, silu, out=grad_up)
        grad_act.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_act, gate, grad_input=grad_gate)


def _weight_gradient(weight: Tensor, grad_out: Tensor, x: Tensor) -> Tensor | None:
    """grad_out^T x, or None where it was added to the sum that Megatron's DDP keeps.

    DDP's hook would do the same: add `grad`, if there is one, and forget it. Each expert's gradient would be written,
    read and kept until those of all experts are there.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None:
        return grad_out.t() @ x
    if main_grad.dtype == x.dtype:
        main_grad.addmm_(grad_out.t(), x)
    else:
        main_grad += grad_out.t() @ x
    return None
