"""Experts computed together: Megatron's results, gradients and sums, and Megatron's own path where they do not fit."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megamed.models.language import LanguageConfig
from megamed.models.moe import BatchedExperts, MoEConfig, batched
from megamed.models.moe import experts as module
from megamed.runtime import ParallelConfig, build_mesh, seed_everything

HIDDEN, WIDTH = 16, 24
# Tokens of each expert: one has none, one has one, one has many.
COUNTS = (5, 0, 33, 1)

# Of the largest value: fp32 sums of tens of terms in another order; bf16 keeps 8 bits and is rounded at other places.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def build(kind: type[SequentialMLP], dtype: torch.dtype, num_experts: int) -> SequentialMLP:
    language = LanguageConfig(
        vocab_size=32, hidden_size=HIDDEN, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=32,
        moe=MoEConfig(num_experts=num_experts, intermediate_size=WIDTH),
    )  # fmt: skip
    group = dist.group.WORLD
    groups: Any = SimpleNamespace(ep=group, expt_tp=group, expt_dp=group)
    experts = kind(
        num_experts,
        language.to_mcore(ParallelConfig(), dtype),
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        groups,
    )
    generator = torch.Generator().manual_seed(2)
    for weight in experts.parameters():
        weight.data = (torch.randn(weight.shape, generator=generator) / 4).to(dtype)
    return experts


def start() -> None:
    """Seed the random numbers that Megatron fills weights with."""
    seed_everything(1, build_mesh(ParallelConfig(), 1).data_rank)


def outcome(experts: SequentialMLP, counts: tuple[int, ...], main_grads: str | None = None) -> dict[str, Tensor]:
    """Result and all gradients, with the sums that Megatron's DDP keeps where `main_grads` gives their type."""
    dtype = next(experts.parameters()).dtype
    generator = torch.Generator().manual_seed(5)
    x_NH = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs_N = torch.rand(sum(counts), generator=generator).requires_grad_()
    grad_NH = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)
    weights = dict(experts.named_parameters())
    for weight in weights.values():
        if main_grads is not None and weight.requires_grad:
            weight.main_grad = torch.full(weight.shape, 0.5, dtype=getattr(torch, main_grads))  # type: ignore[attr-defined]
    y_NH, bias = experts(x_NH, torch.tensor(counts), probs_N)
    assert bias is None
    y_NH.backward(grad_NH)
    assert x_NH.grad is not None and probs_N.grad is not None
    found = {"y": y_NH.detach(), "x": x_NH.grad, "probs": probs_N.grad}
    for name, weight in weights.items():
        if not weight.requires_grad:
            assert weight.grad is None
            continue
        total = torch.zeros_like(weight) if weight.grad is None else weight.grad
        found[name] = total + getattr(weight, "main_grad", 0.0)
    return found


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, over its largest value."""
    assert found.keys() == wanted.keys()
    return {
        name: float((found[name].float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-30))
        for name, want in wanted.items()
        if want.numel()
    }


def _sides(dtype: torch.dtype, counts: tuple[int, ...], main_grads: str | None, small: bool, frozen: bool) -> Any:
    sizes = (module._PIECE, module._GROUP)
    if small:  # a few rows at a time, and no two experts together
        module._PIECE, module._GROUP = 2 * WIDTH, 4 * WIDTH
    try:
        sides = []
        for kind in (BatchedExperts, SequentialMLP):
            experts = build(kind, dtype, len(counts))
            if frozen:
                experts.local_experts[0].requires_grad_(False)
                experts.local_experts[2].linear_fc1.requires_grad_(False)
            sides.append(outcome(experts, counts, main_grads))
    finally:
        module._PIECE, module._GROUP = sizes
    return differences(*sides)


def _every_case() -> list[tuple[str, torch.dtype, dict[str, float]]]:
    start()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, counts, main_grads, small, frozen in (
            ("plain", COUNTS, None, False, False),
            ("in pieces", COUNTS, None, True, False),
            ("added to fp32 sums", COUNTS, "float32", False, False),
            ("added to bf16 sums", COUNTS, "bfloat16", False, False),
            ("some frozen", COUNTS, None, False, True),
            ("one expert", (7,), None, False, False),
            ("no token", (0, 0, 0, 0), None, False, False),
        ):
            if (name, dtype) == ("added to bf16 sums", torch.float32):
                continue  # DDP keeps sums in the parameters' type or in fp32
            found.append((name, dtype, _sides(dtype, counts, main_grads, small, frozen)))
    return found


def test_results_and_gradients_are_megatrons(ranks: Any) -> None:
    cases = ranks.run(_every_case, 1)[0]
    assert len(cases) == 13
    for name, dtype, worst in cases:
        assert max(worst.values()) < TOLERANCE[dtype], (name, dtype, worst)


def _sums_take_the_gradient() -> list[bool]:
    start()
    experts = build(BatchedExperts, torch.float32, len(COUNTS))
    outcome(experts, COUNTS, "float32")
    return [weight.grad is None for weight in experts.parameters()]


def test_a_gradient_that_was_added_to_the_sum_is_not_kept(ranks: Any) -> None:
    assert all(ranks.run(_sums_take_the_gradient, 1)[0])


def _hooked() -> tuple[int, dict[str, float]]:
    start()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    sides = []
    for kind in (BatchedExperts, SequentialMLP):
        experts = build(kind, torch.float32, len(COUNTS))
        experts.local_experts[1].linear_fc2.register_forward_hook(count)
        sides.append(outcome(experts, COUNTS))
    return calls, differences(*sides)


def test_experts_that_somebody_watches_are_called(ranks: Any) -> None:
    calls, worst = ranks.run(_hooked, 1)[0]
    assert calls == 2
    assert max(worst.values()) == 0.0


def test_both_kinds_of_layer_specs_and_no_other_experts() -> None:
    spec = batched(ModuleSpec(module=SequentialMLP, submodules="those"))
    assert (spec.module, spec.submodules) == (BatchedExperts, "those")
    made = batched(partial(SequentialMLP, submodules="those"))
    assert (made.func, made.keywords) == (BatchedExperts, {"submodules": "those"})
    grouped = ModuleSpec(module=torch.nn.Linear)
    assert batched(grouped) is grouped


@pytest.mark.parametrize("counts", [(3, 3), (0, 9)])
def test_experts_are_grouped_up_to_a_size(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 4 * WIDTH)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    groups = module._groups([*counts, 1], WIDTH, torch.device("cpu"))
    assert [expert for group in groups for expert in group.experts] == [0, 1, 2]
    assert [row for group in groups for row in range(group.rows.start, group.rows.stop)] == list(range(sum(counts) + 1))
    assert all(sum(map(bool, group.counts)) < 2 or sum(group.counts) <= 4 for group in groups)
