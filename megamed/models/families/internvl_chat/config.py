"""config.json of the InternVL releases with code of their own: InternVL 1.5 to 3.5, `InternVLChatModel`."""

from collections.abc import Collection
from typing import Any

from megamed.models.families.decoder import Values, read_decoder
from megamed.models.families.decoder import decoder_of as of_values
from megamed.models.language.hf import Family as Decoder
from megamed.models.projector import ProjectorConfig
from megamed.models.vision import VisionConfig
from megamed.models.vlm import VLMConfig

OUTPUTS = ("language_model.lm_head.weight", "language_model.output.weight")


def decoder_of(config: dict[str, Any]) -> Decoder:
    """Whose names the language model's weights have."""
    return of_values(config.get("llm_config", {}))


def read_config(config: dict[str, Any], names: Collection[str] = ()) -> VLMConfig:
    """The model of a config.json.

    Args:
        config: its values.
        names: of the tensors, where they are known: an output layer that is not there is tied.

    Raises:
        UserError: it is not a model that can be built here; names the key.
    """
    whole, vision = Values(config, ""), Values(config.get("vision_config", {}), "vision_config.")
    whole.want("ps_version", ("v2", None), None, "only the second version of the pixel shuffle can be built")
    vision.want("hidden_act", "gelu", "gelu", "only GELU can be built")
    vision.want("norm_type", ("rms_norm", "layer_norm"), "rms_norm", "rms_norm or layer_norm can be built")
    llm = config.get("llm_config", {})
    tied = bool(llm.get("tie_word_embeddings", False)) or (bool(names) and not any(x in names for x in OUTPUTS))
    language = read_decoder(llm, "llm_config.", tied)
    tower = VisionConfig(
        hidden_size=vision.need("hidden_size"),
        num_layers=vision.need("num_hidden_layers"),
        num_heads=vision.need("num_attention_heads"),
        intermediate_size=vision.need("intermediate_size"),
        image_size=whole.get("force_image_size", vision.need("image_size")),
        patch_size=vision.need("patch_size"),
        qkv_bias=vision.get("qkv_bias", False),
        qk_norm=vision.get("qk_normalization", True),
        norm=vision.get("norm_type", "rms_norm"),
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        layer_scale_init=vision.get("initializer_factor", 0.1),
        output_layer=whole.get("select_layer", -1),
    )
    projector = ProjectorConfig(tower.hidden_size, language.hidden_size, whole.get("downsample_ratio", 0.5))
    return VLMConfig(name="internvl", vision=tower, projector=projector, language=language)
