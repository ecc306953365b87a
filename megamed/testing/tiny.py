"""Tiny models of each kind, small enough for many parallel layouts on one machine."""

from megamed.models.language import LanguageConfig
from megamed.models.moe import MoEConfig
from megamed.models.projector import ProjectorConfig
from megamed.models.vision import VisionConfig
from megamed.models.vlm import VLMConfig


def tiny_vlm(num_experts: int = 0, num_layers: int = 4, **language: object) -> VLMConfig:
    """A 4-layer InternVL with 4 tokens a frame; every parallel size of 2 divides it.

    Args:
        num_experts: experts of each MoE layer; 0 for a dense model.
        num_layers: depth of the language model.
        language: further fields of `LanguageConfig`.
    """
    vision = VisionConfig(
        image_size=28,
        patch_size=7,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        qkv_bias=True,
        qk_norm=False,
        norm="layer_norm",
    )
    moe = MoEConfig(num_experts=num_experts, top_k=2, intermediate_size=48, aux_loss_coeff=0.05, z_loss_coeff=0.01)
    settings: dict = dict(
        vocab_size=250,
        hidden_size=64,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=96,
        qk_norm=True,
        moe=moe,
    )
    settings.update(language)
    return VLMConfig(
        name="tiny",
        vision=vision,
        projector=ProjectorConfig(vision_hidden_size=32, language_hidden_size=64),
        language=LanguageConfig(**settings),
    )
