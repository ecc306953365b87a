"""Vision tower weights to and from InternViT's: transformers' `InternVLVisionModel`, and the releases' own."""

import re
from collections.abc import Mapping

from torch import Tensor

from megamed.models.weight_map import Line, Table, to_ours, to_theirs

# Names within the tower: what is in front of it (`vision_tower.`, `vision_model.`) is the family's.
_LAYER = "encoder.layer.{i}"
TRANSFORMERS = Table(
    (
        Line("class_token", ("embeddings.cls_token",)),
        Line("position_embedding.weight", ("embeddings.position_embeddings",)),
        *(
            Line(f"patch_embedding.{kind}", (f"embeddings.patch_embeddings.projection.{kind}",))
            for kind in ("weight", "bias")
        ),
        *(
            Line(f"layers.{{i}}.attention.qkv.{kind}", tuple(f"{_LAYER}.attention.{x}_proj.{kind}" for x in "qkv"))
            for kind in ("weight", "bias")
        ),
        *(Line(f"layers.{{i}}.attention.{x}_norm.weight", (f"{_LAYER}.attention.{x}_norm.weight",)) for x in "qk"),
        *(
            Line(f"layers.{{i}}.{ours}.{kind}", (f"{_LAYER}.{theirs}.{kind}",))
            for ours, theirs in {
                "norm1": "layernorm_before",
                "attention.proj": "attention.projection_layer",
                "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items()
            for kind in ("weight", "bias")
        ),
        *(Line(f"layers.{{i}}.layer_scale{n}", (f"{_LAYER}.lambda_{n}",)) for n in "12"),
        *(Line(f"norm.{kind}", (f"layernorm.{kind}",)) for kind in ("weight", "bias")),
    )
)

_RELEASED_LAYER = "encoder.layers.{i}"
RELEASED = Table(
    (
        Line("class_token", ("embeddings.class_embedding",)),
        Line("position_embedding.weight", ("embeddings.position_embedding",)),
        *(Line(f"patch_embedding.{kind}", (f"embeddings.patch_embedding.{kind}",)) for kind in ("weight", "bias")),
        *(Line(f"layers.{{i}}.attention.{x}_norm.weight", (f"{_RELEASED_LAYER}.attn.{x}_norm.weight",)) for x in "qk"),
        *(
            Line(f"layers.{{i}}.{ours}.{kind}", (f"{_RELEASED_LAYER}.{theirs}.{kind}",))
            for ours, theirs in {
                "norm1": "norm1",
                "attention.qkv": "attn.qkv",
                "attention.proj": "attn.proj",
                "norm2": "norm2",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items()
            for kind in ("weight", "bias")
        ),
        *(Line(f"layers.{{i}}.layer_scale{n}", (f"{_RELEASED_LAYER}.ls{n}",)) for n in "12"),
    )
)


def from_hf(state_dict: Mapping[str, Tensor], num_layers: int | None = None) -> dict[str, Tensor]:
    """State dict of an `InternVLVisionModel` to that of a `VisionTower`.

    Args:
        state_dict: names within the vision model.
        num_layers: for a tower whose `output_layer` is not -1: its `num_layers_run`. The layers behind it and
            the final norm, which such a tower does not have, are left out.

    Raises:
        UserError: a name that the tower does not have, or a missing part of a fused weight.
    """
    ours = to_ours(TRANSFORMERS, state_dict)
    if num_layers is None:
        return ours
    behind = re.compile(r"norm\.|layers\.(\d+)\.")
    found = {name: behind.match(name) for name in ours}
    return {
        name: tensor
        for name, tensor in ours.items()
        if (match := found[name]) is None or (match[1] is not None and int(match[1]) < num_layers)
    }


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `VisionTower` to that of an `InternVLVisionModel`.

    Raises:
        UserError: a name that is not a vision tower's.
    """
    return to_theirs(TRANSFORMERS, state_dict)
