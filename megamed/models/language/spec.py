"""The layer spec: Megatron's decoder block, with Transformer Engine's modules where it is present."""

from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megamed.models.language.attention import BuildAttend, RotaryAttention
from megamed.models.language.rotary import RotaryConfig
from megamed.models.moe import MoEConfig, Router, batched


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, its weight marked for Megatron's sequence parallelism.

    Megatron's own wrapper refuses sequence parallelism for torch norms; the mark is all that it
    needs: the weight's gradient is then summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def decoder_block_spec(
    config: TransformerConfig,
    rotary: RotaryConfig,
    moe: MoEConfig,
    attend: BuildAttend,
    use_transformer_engine: bool,
    pp_rank: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline stage (and virtual chunk) builds, dense or expert by layer."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine, normalization="RMSNorm", vp_stage=vp_stage, pp_rank=pp_rank
    )
    for layer in block.layer_specs:
        mlp = layer.submodules.mlp
        if isinstance(mlp, partial):  # megatron-core 0.19; 0.16 has a ModuleSpec here
            mlp = ModuleSpec(module=mlp.func, submodules=mlp.keywords.get("submodules"))
        if mlp.module is MoELayer:
            mlp.submodules.router = partial(Router, moe)
            mlp.submodules.experts = batched(mlp.submodules.experts)
        layer.submodules.self_attention.submodules.core_attention = partial(
            RotaryAttention, rotary=rotary, build=attend
        )
    if use_transformer_engine:
        return block
    for layer in block.layer_specs:
        modules = layer.submodules
        modules.input_layernorm = RMSNorm
        modules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention = modules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    block.layer_norm = RMSNorm
    return block
