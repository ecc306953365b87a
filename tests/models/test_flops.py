"""Analytic FLOP counts against torch's counter on the real modules: whole numbers, so exact equality.

The counter knows no CPU flash attention (it counts 0), so attention runs in its plain ("math") form here,
which does just what the formulas count: two products forward, four backward.
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from megamed.models.flops import Flops, language_flops, projector_flops, vision_flops
from megamed.models.projector import Projector, ProjectorConfig
from megamed.models.vision import VisionConfig, VisionTower


def counted(run: Callable[[], torch.Tensor]) -> Flops:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = run()
        forward = counter.get_total_flops()
        out.sum().backward()
    return Flops(forward, counter.get_total_flops() - forward)


@pytest.mark.parametrize(
    "changes", [{}, {"output_layer": -2}, {"qk_norm": False, "norm": "layer_norm", "qkv_bias": True}]
)
@pytest.mark.parametrize("image_size", [56, 84])
def test_vision(image_size: int, changes: dict) -> None:
    shape = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 80, "image_size": 56}
    config = VisionConfig(**shape, **changes)
    tower = VisionTower(config)
    frames_NCHW = torch.randn(3, 3, image_size, image_size)
    assert vision_flops(config, 3, image_size) == counted(lambda: tower(frames_NCHW))


def test_vision_takes_the_native_size_by_default() -> None:
    config = VisionConfig()
    assert vision_flops(config, 2) == vision_flops(config, 2, 448)


@pytest.mark.parametrize("ratio", [0.5, 0.25])
def test_projector(ratio: float) -> None:
    config = ProjectorConfig(vision_hidden_size=32, language_hidden_size=48, downsample_ratio=ratio)
    projector = Projector(config)
    patches_NPD = torch.randn(3, 64, 32, requires_grad=True)
    expected = counted(lambda: projector(patches_NPD))
    assert projector_flops(config, 3, image_size=112, patch_size=14) == expected


DENSE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 72,
}  # fmt: skip
OURS = {
    "vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 72,
}  # fmt: skip
LENGTHS = (12, 7, 1)


def counted_documents(model: torch.nn.Module) -> Flops:
    """Every document on its own: what packed documents cost that do not see each other."""
    total = Flops(0, 0)
    for length in LENGTHS:
        tokens = torch.arange(length)[None]
        total = total + counted(lambda tokens=tokens: model(tokens, use_cache=False).logits)
    return total


@pytest.mark.parametrize("head_dim", [8, 16])
def test_llama(head_dim: int) -> None:
    model = LlamaForCausalLM(LlamaConfig(**DENSE, head_dim=head_dim))
    expected = counted_documents(model)
    assert language_flops(LENGTHS, **OURS, head_dim=head_dim, causal=False) == expected


def test_qwen2() -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**DENSE))
    assert language_flops(LENGTHS, **OURS, head_dim=8, causal=False) == counted_documents(model)


def test_mixture_of_experts() -> None:
    config = Qwen2MoeConfig(
        **DENSE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
        shared_expert_intermediate_size=24, mlp_only_layers=[0],
    )  # fmt: skip
    config._experts_implementation = "eager"
    found = counted_documents(Qwen2MoeForCausalLM(config))
    expected = language_flops(
        LENGTHS, **OURS, head_dim=8, causal=False, first_dense_layers=1, num_experts=6, top_k=2,
        moe_intermediate_size=40, shared_intermediate_size=24,
    )  # fmt: skip
    # Qwen2-MoE has a gate on its shared expert, one output a token, which is not ours.
    gate = 2 * sum(LENGTHS) * 32 * 2
    assert expected + Flops(gate, 2 * gate) == found


def test_causal_attention_counts_half() -> None:
    full = language_flops(LENGTHS, **OURS, head_dim=8, causal=False)
    half = language_flops(LENGTHS, **OURS, head_dim=8)
    attention = 3 * sum(4 * length * length * 4 * 8 for length in LENGTHS)
    assert full.forward - half.forward == attention // 2
    assert half.total == 3 * half.forward


def test_mlp_without_gate_has_two_matrices() -> None:
    gated = language_flops(LENGTHS, **OURS, head_dim=8)
    plain = language_flops(LENGTHS, **OURS, head_dim=8, swiglu=False)
    assert gated.forward - plain.forward == 3 * 2 * sum(LENGTHS) * 32 * 72
