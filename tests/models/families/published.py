"""The published configurations, as far as they decide about the model."""

from typing import Any

_VIT_6B = {
    "architectures": ["InternVisionModel"], "hidden_act": "gelu", "hidden_size": 3200, "image_size": 448,
    "initializer_factor": 0.1, "intermediate_size": 12800, "layer_norm_eps": 1e-6, "model_type": "intern_vit_6b",
    "norm_type": "rms_norm", "num_attention_heads": 25, "num_hidden_layers": 45, "patch_size": 14,
    "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip
_VIT_300M = {
    **_VIT_6B, "hidden_size": 1024, "initializer_factor": 1.0, "intermediate_size": 4096, "norm_type": "layer_norm",
    "num_attention_heads": 16, "num_hidden_layers": 24, "qk_normalization": False, "qkv_bias": True,
}  # fmt: skip
_CHAT = {
    "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "dynamic_image_size": True,
    "force_image_size": 448, "max_dynamic_patch": 12, "model_type": "internvl_chat", "ps_version": "v2",
    "select_layer": -1, "torch_dtype": "bfloat16", "use_thumbnail": True,
}  # fmt: skip


def _internlm2(**sizes: Any) -> dict[str, Any]:
    return {
        "architectures": ["InternLM2ForCausalLM"], "bias": False, "hidden_act": "silu",
        "max_position_embeddings": 32768, "model_type": "internlm2", "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000, "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "tie_word_embeddings": False,
        "vocab_size": 92553, **sizes,
    }  # fmt: skip


def _qwen(version: str, **sizes: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{version}ForCausalLM"], "hidden_act": "silu", "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False, "use_sliding_window": False,
        **sizes,
    }  # fmt: skip


_QWEN25_7B = _qwen(
    "Qwen2", model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
    num_hidden_layers=28, num_key_value_heads=4, vocab_size=151674,
)  # fmt: skip
_QWEN25_72B = _qwen(
    "Qwen2", model_type="qwen2", hidden_size=8192, intermediate_size=29568, num_attention_heads=64,
    num_hidden_layers=80, num_key_value_heads=8, vocab_size=151674,
)  # fmt: skip
_QWEN3_8B = _qwen(
    "Qwen3", model_type="qwen3", attention_bias=False, head_dim=128, hidden_size=4096, intermediate_size=12288,
    num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, vocab_size=151936,
)  # fmt: skip
_QWEN3_30B = _qwen(
    "Qwen3Moe", model_type="qwen3_moe", attention_bias=False, head_dim=128, hidden_size=2048, intermediate_size=6144,
    num_attention_heads=32, num_hidden_layers=48, num_key_value_heads=4, vocab_size=151936, num_experts=128,
    num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    router_aux_loss_coef=0.001,
)  # fmt: skip
_INTERNLM2_20B = _internlm2(hidden_size=6144, intermediate_size=16384, num_attention_heads=48, num_hidden_layers=48)
_INTERNLM2_7B = _internlm2(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32)


def chat(vision: dict[str, Any], llm: dict[str, Any]) -> dict[str, Any]:
    """config.json of a release with code of its own."""
    return {**_CHAT, "vision_config": vision, "llm_config": llm}


def native(llm: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """config.json of the same model with InternViT-300M in the format of transformers, as it was first published."""
    text = {key: value for key, value in llm.items() if key != "rope_theta"}
    return {
        "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 256,
        "image_token_id": image_token_id, "model_type": "internvl", "projector_hidden_act": "gelu",
        "text_config": {**text, "rope_theta": llm["rope_theta"]}, "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_bias": True, "hidden_act": "gelu", "hidden_size": 1024, "image_size": [448, 448],
            "intermediate_size": 4096, "layer_norm_eps": 1e-6, "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision", "norm_type": "layer_norm", "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": [14, 14], "use_absolute_position_embeddings": True,
            "use_mask_token": False, "use_mean_pooling": True, "use_qk_norm": False,
        },
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
    }  # fmt: skip


CHATS: dict[str, dict[str, Any]] = {
    "InternVL-Chat-V1-5": chat(_VIT_6B, _INTERNLM2_20B),
    "InternVL2-8B": chat(_VIT_300M, {**_INTERNLM2_7B, "max_position_embeddings": 32768}),
    "InternVL2_5-26B": chat(_VIT_6B, _INTERNLM2_20B),
    "InternVL3-8B": chat(_VIT_300M, _QWEN25_7B),
    "InternVL3-78B": chat(_VIT_6B, _QWEN25_72B),
    "InternVL3_5-8B": chat(_VIT_300M, _QWEN3_8B),
    "InternVL3_5-30B-A3B": chat(_VIT_300M, _QWEN3_30B),
}
NATIVES: dict[str, dict[str, Any]] = {
    "InternVL3-8B-hf": native(_QWEN25_7B, 151667),
    "InternVL3_5-8B-HF": native(_QWEN3_8B, 151671),
    "InternVL3_5-30B-A3B-HF": native(_QWEN3_30B, 151671),
}
