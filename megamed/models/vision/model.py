"""InternViT: frames in, one hidden state a patch out.

Plain PyTorch. The tower is not split by tensor parallelism: every rank runs all of it on its own frames.

Shapes: N frames; C channels, H and W pixels of a frame; P patches; S = 1 + P tokens of a frame, the class
token first; D hidden size; A heads of size K; G = sqrt(P) patches a side.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megamed.models.vision.config import VisionConfig
from megamed.utils import UserError


def build_norm(config: VisionConfig) -> nn.Module:
    """The norm that `config.norm` names, over the hidden size."""
    if config.norm == "rms_norm":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
    if config.norm == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    raise UserError(f"model.vision.norm={config.norm}: set it to rms_norm or layer_norm", everywhere=True)


class PatchEmbedding(nn.Module):
    """Convolution whose stride is its kernel, written as one matrix product.

    The weight keeps the convolution's shape [D, C, patch, patch].
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.weight = nn.Parameter(
            torch.zeros(config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
        )
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, frames_NCHW: Tensor) -> Tensor:
        num_frames, num_channels, height, _ = frames_NCHW.shape
        grid, patch = height // self.patch_size, self.patch_size
        blocks = frames_NCHW.to(self.weight.dtype).reshape(num_frames, num_channels, grid, patch, grid, patch)
        # Patches row by row; a patch's pixels in the order of the weight: channel, row, column.
        pixels = blocks.permute(0, 2, 4, 1, 3, 5).reshape(num_frames, grid * grid, -1)
        return F.linear(pixels, self.weight.flatten(1), self.bias)


class PositionEmbedding(nn.Module):
    """Learned absolute positions of the class token and of a square grid of patches.

    Another grid gets them by bicubic interpolation, as in InternVL's `interpolate_pos_encoding`.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.grid = config.image_size // config.patch_size
        self.weight = nn.Parameter(torch.zeros(1, 1 + self.grid**2, config.hidden_size))

    def forward(self, grid: int) -> Tensor:
        """Positions [1, 1 + grid * grid, D]."""
        if grid == self.grid:
            return self.weight
        hidden_size = self.weight.shape[-1]
        # In float32, as the releases do: the cubic weights lose too much in bfloat16.
        native_1GGD = self.weight[:, 1:].float().reshape(1, self.grid, self.grid, hidden_size)
        wanted_1DGG = F.interpolate(
            native_1GGD.permute(0, 3, 1, 2), size=(grid, grid), mode="bicubic", align_corners=False
        )
        wanted_1PD = wanted_1DGG.flatten(2).transpose(1, 2).to(self.weight.dtype)
        return torch.cat((self.weight[:, :1], wanted_1PD), dim=1)


class VisionAttention(nn.Module):
    """Full self-attention within a frame. The rows of `qkv` are all of q, then all of k, then all of v."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden_size, self.num_heads = config.hidden_size, config.num_heads
        if hidden_size % self.num_heads:
            raise UserError(
                f"model.vision.num_heads={self.num_heads} must divide model.vision.hidden_size={hidden_size}",
                everywhere=True,
            )
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(hidden_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(hidden_size, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_NSD: Tensor) -> Tensor:
        q_NSD, k_NSD, v_NSD = self.qkv(x_NSD).chunk(3, dim=-1)
        # Views all: the attention kernels read heads through strides.
        q_NASK, k_NASK, v_NASK = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q_norm(q_NSD), self.k_norm(k_NSD), v_NSD)
        )
        out_NASK = F.scaled_dot_product_attention(q_NASK, k_NASK, v_NASK)
        return self.proj(out_NASK.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x_NSD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_NSD)))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with a learned factor per channel (layer scale) on each residual branch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = build_norm(config)
        self.attention = VisionAttention(config)
        self.layer_scale1 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))
        self.norm2 = build_norm(config)
        self.mlp = VisionMLP(config)
        self.layer_scale2 = nn.Parameter(torch.full((config.hidden_size,), config.layer_scale_init))

    def forward(self, x_NSD: Tensor) -> Tensor:
        x_NSD = torch.addcmul(x_NSD, self.attention(self.norm1(x_NSD)), self.layer_scale1)
        return torch.addcmul(x_NSD, self.mlp(self.norm2(x_NSD)), self.layer_scale2)


class VisionTower(nn.Module):
    """InternViT (Chen et al., 2023, arXiv:2312.14238).

    It can be built on the meta device: there are no buffers, and `init_frame_encoder` sets every parameter.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        if not 0 <= config.num_layers_run <= config.num_layers:
            raise UserError(
                f"model.vision.output_layer={config.output_layer} exceeds model.vision.num_layers="
                f"{config.num_layers}: choose one from {-config.num_layers - 1} to {config.num_layers}",
                everywhere=True,
            )
        self.config = config
        self.patch_embedding = PatchEmbedding(config)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = PositionEmbedding(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers_run))
        # Only the last hidden state passes the final norm, as in transformers.
        has_final_norm = config.final_norm and config.output_layer == -1
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if has_final_norm else nn.Identity()

    def forward(self, frames_NCHW: Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames_NCHW: normalised pixels of N square frames whose side is a multiple of the patch size, not
                necessarily `image_size`. N may be 0.

        Returns:
            Hidden states [N, 1 + P, D], the class token first, then the patches row by row. For N = 0 an
            empty tensor outside the autograd graph.

        Raises:
            UserError: the frames are not square, or their side is not a multiple of the patch size.
        """
        height, width = frames_NCHW.shape[-2:]
        patch_size = self.config.patch_size
        if height != width or height % patch_size:
            raise UserError(
                f"frames of {height} x {width} pixels reached the vision tower: resize or pad them "
                f"to squares whose side is a multiple of {patch_size}"
            )
        grid = height // patch_size
        if frames_NCHW.shape[0] == 0:
            return self.class_token.new_empty(0, 1 + grid * grid, self.config.hidden_size)
        patches_NPD = self.patch_embedding(frames_NCHW)
        x_NSD = torch.cat((self.class_token.expand(len(patches_NPD), -1, -1), patches_NPD), dim=1)
        x_NSD = x_NSD + self.position_embedding(grid)
        for layer in self.layers:
            if self.config.recompute:
                # The layers draw no random numbers, so there is no generator state to restore.
                x_NSD = cast(Tensor, checkpoint(layer, x_NSD, use_reentrant=False, preserve_rng_state=False))
            else:
                x_NSD = layer(x_NSD)
        return self.norm(x_NSD)
