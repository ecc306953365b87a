"""What a vision tower is built from, and the settings of the two published InternViT releases."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class VisionConfig:
    """An InternViT-style vision transformer.

    Attributes:
        hidden_size: width of the residual stream.
        num_layers: transformer layers of the published model.
        num_heads: attention heads; divides hidden_size.
        intermediate_size: width of the MLP's inner layer.
        image_size: side in pixels of the square frames that the position embedding was made for. Frames
            of another size are taken too; the embedding is then interpolated.
        patch_size: side of a patch in pixels.
        num_channels: channels of a frame.
        qkv_bias: the query, key and value projections have a bias.
        qk_norm: RMSNorm over the whole hidden size (all heads together) on queries and on keys.
        norm: the norm before attention and before the MLP.
        norm_eps: epsilon of every norm.
        layer_scale_init: initial value of the factors on the two residual branches of a layer.
        output_layer: which hidden state is the output, counted as in `hidden_states` of transformers: 0 is
            the embedding, k the state after k layers, -1 the last. Layers behind it are not built.
        final_norm: LayerNorm on the last hidden state. The InternVL releases have none.
        recompute: run each layer's forward again in the backward pass instead of keeping its activations.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    qk_norm: bool = False
    norm: Literal["rms_norm", "layer_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    layer_scale_init: float = 0.1
    output_layer: int = -1
    final_norm: bool = False
    recompute: bool = False

    @property
    def num_layers_run(self) -> int:
        """Layers up to and with the one whose output is taken."""
        return self.output_layer if self.output_layer >= 0 else self.num_layers + 1 + self.output_layer


def internvit_6b() -> VisionConfig:
    """InternViT-6B-448px V1.2 and V1.5, the vision tower of InternVL 1.5-26B, 2-26B and up.

    Taken from the release's config.json.
    """
    return VisionConfig(
        hidden_size=3200,
        num_layers=45,
        num_heads=25,
        intermediate_size=12800,
        qkv_bias=False,
        qk_norm=True,
        norm="rms_norm",
        layer_scale_init=0.1,
    )


def internvit_300m() -> VisionConfig:
    """InternViT-300M-448px, the vision tower of the smaller InternVL models. From its config.json."""
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
