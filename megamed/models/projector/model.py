"""The projector: patches of a frame in, visual tokens in the language model's width out.

Shapes: N frames; G patches a side, P = G * G patches; D vision hidden size; R patches a side of a token;
T = (G / R) ** 2 visual tokens of a frame; E language hidden size.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from megamed.models.projector.config import ProjectorConfig, patches_per_side
from megamed.utils import UserError


def pixel_shuffle(patches_NPD: Tensor, side: int) -> Tensor:
    """Put each `side` x `side` neighbouring patches side by side into one token.

    The order is that of InternVL's "v2" shuffle, `InternVLModel.pixel_shuffle` of transformers: tokens row by
    row; within a token the patches row by row.

    Args:
        patches_NPD: a square grid of patches, row by row, without the class token.
        side: R.

    Returns:
        [N, P / R**2, R**2 * D].

    Raises:
        UserError: the grid is not square or its side is not a multiple of R.
    """
    num_frames, num_patches, hidden_size = patches_NPD.shape
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches or grid % side:
        raise UserError(
            f"{num_patches} patches do not form a square of {side} x {side} blocks: "
            f"frames must be square, their side a multiple of {side} patches"
        )
    tokens = grid // side
    blocks = patches_NPD.reshape(num_frames, tokens, side, tokens, side, hidden_size)
    return blocks.transpose(2, 3).reshape(num_frames, tokens * tokens, side * side * hidden_size)


class Projector(nn.Module):
    """Pixel shuffle, LayerNorm, linear, exact (erf) GELU, linear (InternVL's `mlp1`)."""

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        self.side = patches_per_side(config.downsample_ratio)
        self.norm = nn.LayerNorm(config.input_size)
        self.fc1 = nn.Linear(config.input_size, config.language_hidden_size)
        self.fc2 = nn.Linear(config.language_hidden_size, config.language_hidden_size)

    def forward(self, patches_NPD: Tensor) -> Tensor:
        """Project the patches [N, P, D] of square frames, class token dropped, to [N, T, E]. N may be 0."""
        tokens_NTD = pixel_shuffle(patches_NPD, self.side)
        return self.fc2(F.gelu(self.fc1(self.norm(tokens_NTD))))
