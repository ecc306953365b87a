"""Vision tower weights to and from transformers' native `InternVLVisionModel`."""

import re
from collections.abc import Mapping

from torch import Tensor

from megamed.models.weight_map import Rename, to_ours, to_theirs

_THEIR_LAYER = "encoder.layer.{i}"


def _fused_qkv(kind: str) -> Rename:
    return Rename(
        f"layers.{{i}}.attention.qkv.{kind}",
        tuple(f"{_THEIR_LAYER}.attention.{part}_proj.{kind}" for part in ("q", "k", "v")),
    )


# Names within the tower: `model.vision_tower.` is taken off and put back by the caller.
TABLE = (
    Rename("class_token", ("embeddings.cls_token",)),
    Rename("position_embedding.weight", ("embeddings.position_embeddings",)),
    Rename("patch_embedding.weight", ("embeddings.patch_embeddings.projection.weight",)),
    Rename("patch_embedding.bias", ("embeddings.patch_embeddings.projection.bias",)),
    Rename("layers.{i}.norm1.weight", (f"{_THEIR_LAYER}.layernorm_before.weight",)),
    Rename("layers.{i}.norm1.bias", (f"{_THEIR_LAYER}.layernorm_before.bias",)),
    _fused_qkv("weight"),
    _fused_qkv("bias"),
    Rename("layers.{i}.attention.q_norm.weight", (f"{_THEIR_LAYER}.attention.q_norm.weight",)),
    Rename("layers.{i}.attention.k_norm.weight", (f"{_THEIR_LAYER}.attention.k_norm.weight",)),
    Rename("layers.{i}.attention.proj.weight", (f"{_THEIR_LAYER}.attention.projection_layer.weight",)),
    Rename("layers.{i}.attention.proj.bias", (f"{_THEIR_LAYER}.attention.projection_layer.bias",)),
    Rename("layers.{i}.layer_scale1", (f"{_THEIR_LAYER}.lambda_1",)),
    Rename("layers.{i}.norm2.weight", (f"{_THEIR_LAYER}.layernorm_after.weight",)),
    Rename("layers.{i}.norm2.bias", (f"{_THEIR_LAYER}.layernorm_after.bias",)),
    Rename("layers.{i}.mlp.fc1.weight", (f"{_THEIR_LAYER}.mlp.fc1.weight",)),
    Rename("layers.{i}.mlp.fc1.bias", (f"{_THEIR_LAYER}.mlp.fc1.bias",)),
    Rename("layers.{i}.mlp.fc2.weight", (f"{_THEIR_LAYER}.mlp.fc2.weight",)),
    Rename("layers.{i}.mlp.fc2.bias", (f"{_THEIR_LAYER}.mlp.fc2.bias",)),
    Rename("layers.{i}.layer_scale2", (f"{_THEIR_LAYER}.lambda_2",)),
    Rename("norm.weight", ("layernorm.weight",)),
    Rename("norm.bias", ("layernorm.bias",)),
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
    ours = to_ours(TABLE, state_dict)
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
    return to_theirs(TABLE, state_dict)
