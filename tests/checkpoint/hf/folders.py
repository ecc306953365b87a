"""Tiny Hugging Face folders: by transformers itself, and of its weights in the names of the releases."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

VOCABULARY, HIDDEN, HEADS, KV_HEADS, LAYERS = 250, 64, 4, 2, 2
IMAGE_TOKEN = 249
_TEXT = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512, rms_norm_eps=1e-5,
)  # fmt: skip
_EXPERTS = dict(num_experts_per_tok=2, router_aux_loss_coef=0.01)
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], **_EXPERTS,
    },
    "mixtral": {"head_dim": 16, "num_local_experts": 4, "sliding_window": None, **_EXPERTS},
}  # fmt: skip


def vision(is_large: bool) -> dict[str, Any]:
    """A tower like InternViT-6B (RMSNorm, q and k normalised, no bias), or like InternViT-300M."""
    return dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=[28, 28],
        patch_size=[7, 7], attention_bias=not is_large, use_qk_norm=is_large,
        norm_type="rms_norm" if is_large else "layer_norm", layer_norm_eps=1e-6,
    )  # fmt: skip


def native(decoder: str, tied: bool = False, is_large: bool = False, seed: int = 1) -> InternVLForConditionalGeneration:
    """A model of transformers with random weights, biases and norms too."""
    text = {"model_type": decoder, **_TEXT, **DECODERS[decoder], "tie_word_embeddings": tied}
    config = InternVLConfig(
        vision_config=vision(is_large), text_config=text, image_token_id=IMAGE_TOKEN, downsample_ratio=0.5,
        tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.02 if name.endswith("layernorm.weight") else 0.1
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def save(model: InternVLForConditionalGeneration, folder: Path, dtype: torch.dtype, shard_size: str = "60KB") -> None:
    """As transformers saves it, in several files, with a tokenizer and other files beside."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    beside(folder)
    model.float()


def beside(folder: Path) -> None:
    """What a release has beside its weights; a folder in it, and bytes that are no text."""
    tokens = [{"id": IMAGE_TOKEN, "content": "<IMG_CONTEXT>"}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5]}\r\n')
    (folder / "modeling.py").write_bytes(b"# \xff\n")
    (folder / "chat").mkdir(exist_ok=True)
    (folder / "chat" / "template.jinja").write_text("{{ messages }}")


_LAYER_NAMES = {
    "attention.projection_layer": "attn.proj", "attention.q_norm": "attn.q_norm", "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1", "layernorm_after": "norm2", "lambda_1": "ls1", "lambda_2": "ls2", "mlp.": "mlp.",
}  # fmt: skip
_INTERNLM2 = {
    "embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def release(folder: Path, decoder: str, dtype: torch.dtype, is_large: bool = True, tied: bool = False) -> Any:
    """A folder in the layout of the releases, of the weights of a model of transformers, which is returned.

    Args:
        folder: to write.
        decoder: of `DECODERS`, or `internlm2`, which has the function of a Llama, or `phi3`, likewise.
        dtype: of the weights.
        is_large: the vision tower is like InternViT-6B.
        tied: the output layer is the embedding.
    """
    model = native({"internlm2": "llama", "phi3": "llama"}.get(decoder, decoder), tied, is_large)
    saved = folder / "saved"
    model.to(dtype).save_pretrained(saved)
    model.float()
    theirs = load_file(saved / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name.startswith("vision_tower."):
            _add_vision(tensors, name.removeprefix("vision_tower."), tensor, theirs)
        elif name.startswith("multi_modal_projector."):
            part, kind = name.removeprefix("multi_modal_projector.").split(".")
            tensors[f"mlp1.{dict(layer_norm=0, linear_1=1, linear_2=3)[part]}.{kind}"] = tensor
        elif decoder == "internlm2":
            _add_internlm2(tensors, name, tensor, theirs)
        elif decoder == "phi3":
            _add_phi3(tensors, name, tensor, theirs)
        else:
            tensors[name] = tensor
    for path in saved.iterdir():
        path.unlink()
    saved.rmdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_release_config(model, decoder, is_large, tied, dtype), indent=2))
    beside(folder)
    return model


def _add_vision(tensors: dict[str, Tensor], name: str, tensor: Tensor, theirs: dict[str, Tensor]) -> None:
    if name.startswith("embeddings."):
        for old, new in (
            ("cls_token", "class_embedding"), ("patch_embeddings.projection", "patch_embedding"),
            ("position_embeddings", "position_embedding"),
        ):  # fmt: skip
            name = name.replace(old, new)
        tensors[f"vision_model.{name}"] = tensor
        return
    _, _, layer, rest = name.split(".", 3)
    place = f"vision_model.encoder.layers.{layer}"
    if rest.startswith("attention.q_proj"):
        kind = rest.rpartition(".")[2]
        parts = [theirs[f"vision_tower.encoder.layer.{layer}.attention.{x}_proj.{kind}"] for x in "qkv"]
        tensors[f"{place}.attn.qkv.{kind}"] = torch.cat(parts)
    elif not rest.startswith(("attention.k_proj", "attention.v_proj")):
        old, new = next((old, new) for old, new in _LAYER_NAMES.items() if rest.startswith(old))
        tensors[f"{place}.{rest.replace(old, new)}"] = tensor


def _add_internlm2(tensors: dict[str, Tensor], name: str, tensor: Tensor, theirs: dict[str, Tensor]) -> None:
    """q, k and v go by key/value head."""
    if "self_attn.q_proj" in name:
        heads = HEADS // KV_HEADS
        q, k, v = (theirs[name.replace("q_proj", f"{x}_proj")].view(KV_HEADS, -1, HIDDEN) for x in "qkv")
        assert q.shape[1] == heads * k.shape[1]
        name = name.replace("self_attn.q_proj", "attention.wqkv")
        tensors[name] = torch.cat([q, k, v], dim=1).reshape(-1, HIDDEN)
    elif not any(f"self_attn.{x}_proj" in name for x in "kv"):
        for old, new in {**_INTERNLM2, "lm_head": "output"}.items():
            name = name.replace(old, new)
        tensors[name] = tensor


def _add_phi3(tensors: dict[str, Tensor], name: str, tensor: Tensor, theirs: dict[str, Tensor]) -> None:
    for first, others, fused in (("q_proj", "qkv", "qkv_proj"), ("gate_proj", ("gate", "up"), "gate_up_proj")):
        if first in name:
            tensors[name.replace(first, fused)] = torch.cat([theirs[name.replace(first, f"{x}_proj")] for x in others])
            return
    if not any(x in name for x in ("k_proj", "v_proj", "up_proj")):
        tensors[name] = tensor


def _release_config(model: Any, decoder: str, is_large: bool, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    architectures = {
        "internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "phi3": "Phi3ForCausalLM",
    }  # fmt: skip
    llm = {
        **_TEXT, **DECODERS.get(decoder, {}), "architectures": [architectures[decoder]], "model_type": decoder,
        "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": tied, "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0} if decoder == "internlm2" else None,
    }  # fmt: skip
    tower = {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 32, "hidden_act": "gelu",
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 28, "patch_size": 7,
        "qkv_bias": not is_large, "qk_normalization": is_large, "norm_type": "rms_norm" if is_large else "layer_norm",
        "layer_norm_eps": 1e-6, "initializer_factor": 0.1, "torch_dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
        "force_image_size": 28, "ps_version": "v2", "select_layer": -1, "template": "internlm2-chat",
        "torch_dtype": str(dtype).removeprefix("torch."), "llm_config": llm, "vision_config": tower,
    }  # fmt: skip
