"""Analytic FLOP counts against torch's counter on Megatron's GPTModel: whole numbers, so exact equality.

The counter knows no CPU flash attention (it counts 0), so attention runs in its plain ("math") form here,
which computes every score and masks: full attention is what it counts.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from megamed.models.flops import Flops, language_flops
from megamed.models.language import AttentionConfig, LanguageConfig, Packing, build_language_chunks
from megamed.models.moe import MoEConfig
from megamed.parallel.init import init_language
from megamed.runtime import Mesh

LENGTHS = (24, 13, 1)
# A vocabulary without padding: model FLOPs do not count padded rows, a counter does.
SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 72,
}  # fmt: skip
CASES: dict[str, tuple[dict, dict]] = {
    "dense": ({}, {}),
    "wide heads, biases, norms, tied": (
        {"head_dim": 16, "qkv_bias": True, "qk_norm": True, "tie_embeddings": True},
        {},
    ),
    "experts": ({}, {"num_experts": 6, "top_k": 2, "intermediate_size": 40, "z_loss_coeff": 0.1}),
    "shared expert, one dense layer": (
        {},
        {
            "num_experts": 4, "top_k": 3, "intermediate_size": 40, "shared_intermediate_size": 24,
            "first_dense_layers": 1,
        },
    ),
}  # fmt: skip


def counted(config: LanguageConfig, mesh: Mesh) -> Flops:
    """Forward and backward of a training step over one row of packed documents."""
    (model,) = build_language_chunks(config, AttentionConfig(kernel="math"), mesh, torch.float32)
    init_language([model], 1, 0.1, config.num_layers)
    total = sum(LENGTHS)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packing = Packing.of_row(bounds)
    tokens_BS, positions_BS = torch.arange(total)[None], torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with FlopCounterMode(display=False) as counter:
        # From logits: the losses' own head multiplies them a second time, in the backward pass.
        logits_BSV = model(tokens_BS, positions_BS, None, packed_seq_params=packing)
        forward = counter.get_total_flops()
        F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[0]).backward()
    return Flops(forward, counter.get_total_flops() - forward)


@pytest.mark.parametrize("name", CASES)
def test_formula_equals_the_counter(name: str, mesh: Mesh) -> None:
    sizes, experts = CASES[name]
    config = LanguageConfig(**SIZES, **sizes, moe=MoEConfig(**experts))
    moe = {("moe_" if key == "intermediate_size" else "") + key: value for key, value in experts.items()}
    moe.pop("z_loss_coeff", None)
    expected = language_flops(LENGTHS, **SIZES, head_dim=config.head_dim or 8, causal=False, **moe)
    # Attention keeps no scores for the backward pass, and multiplies queries and keys again there.
    width = config.num_heads * config.kv_channels
    again = config.num_layers * sum(2 * length * length * width for length in LENGTHS)
    assert counted(config, mesh) == Flops(expected.forward, expected.backward + again)
