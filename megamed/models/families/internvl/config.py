"""config.json of InternVL in the format of transformers: `InternVLForConditionalGeneration`."""

from collections.abc import Collection
from typing import Any

from megamed.models.families.decoder import Values, read_decoder, write_decoder
from megamed.models.families.decoder import decoder_of as of_values
from megamed.models.language.hf import Family as Decoder
from megamed.models.projector import ProjectorConfig, tokens_per_frame
from megamed.models.vision import VisionConfig
from megamed.models.vlm import VLMConfig
from megamed.utils import UserError

OUTPUTS = ("language_model.lm_head.weight", "lm_head.weight")


def decoder_of(config: dict[str, Any]) -> Decoder:
    """Whose names the language model's weights have."""
    return of_values({"model_type": "qwen2", **config.get("text_config", {})})


def read_config(config: dict[str, Any], names: Collection[str] = ()) -> VLMConfig:
    """The model of a config.json.

    Args:
        config: its values.
        names: of the tensors, where they are known: an output layer that is not there is tied.

    Raises:
        UserError: it is not a model that can be built here; names the key.
    """
    whole, vision = Values(config, ""), Values(config.get("vision_config", {}), "vision_config.")
    whole.want("projector_hidden_act", "gelu", "gelu", "only GELU can be built")
    whole.want("vision_feature_select_strategy", "default", "default", "the class token is never a visual token here")
    vision.want("hidden_act", "gelu", "gelu", "only GELU can be built")
    vision.want("use_mask_token", False, False, "mask tokens are for training of vision towers alone")
    vision.want("use_absolute_position_embeddings", True, True, "towers without position embedding cannot be built")
    vision.want("norm_type", ("rms_norm", "layer_norm"), "layer_norm", "rms_norm or layer_norm can be built")
    text = {"model_type": "qwen2", **config.get("text_config", {})}
    # transformers 5 writes a value of its own for the whole model; which layers there are, files say.
    tied = not any(x in names for x in OUTPUTS) if names else bool(text.get("tie_word_embeddings", False))
    language = read_decoder(text, "text_config.", tied or bool(text.get("tie_word_embeddings", False)))
    tower = VisionConfig(
        hidden_size=vision.get("hidden_size", 1024),
        num_layers=vision.get("num_hidden_layers", 24),
        num_heads=vision.get("num_attention_heads", 16),
        intermediate_size=vision.get("intermediate_size", 4096),
        image_size=_side(vision, "image_size", 448),
        patch_size=_side(vision, "patch_size", 14),
        qkv_bias=vision.get("attention_bias", False),
        qk_norm=vision.get("use_qk_norm", False),
        norm=vision.get("norm_type", "layer_norm"),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        layer_scale_init=vision.get("layer_scale_init_value", 0.1),
        output_layer=whole.get("vision_feature_layer", -1),
        final_norm=not vision.get("use_mean_pooling", True),
    )
    projector = ProjectorConfig(tower.hidden_size, language.hidden_size, whole.get("downsample_ratio", 0.5))
    return VLMConfig(name="internvl", vision=tower, projector=projector, language=language)


def write_config(model: VLMConfig, image_token_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a model of ours.

    Args:
        model: its sizes.
        image_token_id: of the token that stands for a visual one.
        dtype: of the weights, in transformers' words.

    Raises:
        UserError: transformers has no such model; says why.
    """
    vision = model.vision
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": dtype,
        "downsample_ratio": model.projector.downsample_ratio,
        "image_seq_length": tokens_per_frame(
            vision.image_size, vision.patch_size, model.projector.downsample_ratio
        ),
        "image_token_id": image_token_id,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": model.language.tie_embeddings,
        "vision_feature_layer": vision.output_layer,
        "vision_feature_select_strategy": "default",
        "text_config": write_decoder(model.language),
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "norm_type": vision.norm,
            "layer_norm_eps": vision.norm_eps,
            "layer_scale_init_value": vision.layer_scale_init,
            "use_mean_pooling": not vision.final_norm,
        },
    }


def _side(vision: Values, name: str, default: int) -> int:
    """A side in pixels, which may stand there twice."""
    value = vision.get(name, default)
    sides = value if isinstance(value, list) else [value]
    if len(set(sides)) > 1:
        raise UserError(f"{vision.key(name)} is {value}; only squares can be built")
    return int(sides[0])
