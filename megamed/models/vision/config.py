"""What a vision tower is built from. The defaults are InternViT-6B-448px."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class VisionConfig:
    """An InternViT-style vision transformer.

    The defaults are InternViT-6B-448px V1.2 and V1.5, the tower of InternVL-26B, as in its config.json.
    """

    hidden_size: int = 3200
    """Width of the residual stream."""
    num_layers: int = 45
    """Transformer layers of the published model."""
    num_heads: int = 25
    """Attention heads; divides hidden_size."""
    intermediate_size: int = 12800
    """Inner width of the MLP."""
    image_size: int = 448
    """Side in pixels of the square frames that the position embedding was made for. Frames of another size
    are taken too: the embedding is then interpolated."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    num_channels: int = 3
    """Channels of a frame."""
    qkv_bias: bool = False
    """The query, key and value projections have a bias."""
    qk_norm: bool = True
    """RMSNorm over the whole hidden size, all heads together, on queries and on keys."""
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """The norm before attention and before the MLP."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    layer_scale_init: float = 0.1
    """Initial value of the factors on the two residual branches of a layer."""
    output_layer: int = -1
    """Which hidden state is the output, counted as in `hidden_states` of transformers: 0 is the embedding, k
    the state after k layers, -1 the last. Layers behind it are not built."""
    final_norm: bool = False
    """LayerNorm on the last hidden state. The InternVL releases have none."""
    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""

    @property
    def num_layers_run(self) -> int:
        """Layers up to and with the one whose output is taken."""
        return self.output_layer if self.output_layer >= 0 else self.num_layers + 1 + self.output_layer


def internvit_300m() -> VisionConfig:
    """InternViT-300M-448px, the tower of the smaller InternVL models, as in its config.json."""
    return VisionConfig(
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        intermediate_size=4096,
        qkv_bias=True,
        qk_norm=False,
        norm="layer_norm",
        layer_scale_init=1.0,
    )
