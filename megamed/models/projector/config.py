"""What the projector between vision tower and language model is built from, and how many tokens it makes."""

from dataclasses import dataclass

from megamed.utils import UserError


@dataclass
class ProjectorConfig:
    """Pixel shuffle and a two-layer perceptron. The defaults are those of InternVL-26B."""

    vision_hidden_size: int = 3200
    """Width of a patch's hidden state."""
    language_hidden_size: int = 6144
    """Width of the language model's embeddings."""
    downsample_ratio: float = 0.5
    """Side of the token grid over side of the patch grid, one over a whole number. At 0.5 each 2 x 2 patches
    become one visual token."""

    @property
    def input_size(self) -> int:
        """Width of a visual token before the projection: the patches it is made of, side by side."""
        return self.vision_hidden_size * patches_per_side(self.downsample_ratio) ** 2


def patches_per_side(downsample_ratio: float) -> int:
    """Side, in patches, of the square that becomes one visual token.

    Raises:
        UserError: the ratio is not one over a whole number.
    """
    side = round(1 / downsample_ratio) if 0 < downsample_ratio <= 1 else 0
    if side == 0 or abs(side * downsample_ratio - 1) > 1e-6:
        raise UserError(
            f"model.projector.downsample_ratio={downsample_ratio} is not 1 over a whole number: try 0.5",
            everywhere=True,
        )
    return side


def tokens_per_frame(image_size: int, patch_size: int, downsample_ratio: float = 0.5) -> int:
    """Visual tokens that one square frame becomes.

    Args:
        image_size: side of the frame in pixels.
        patch_size: side of a patch in pixels.
        downsample_ratio: as in `ProjectorConfig`.

    Raises:
        UserError: the side does not hold whole tokens.
    """
    token_side = patch_size * patches_per_side(downsample_ratio)
    if image_size <= 0 or image_size % token_side:
        raise UserError(
            f"frames of {image_size} pixels do not divide into visual tokens of {token_side} pixels a side "
            f"(patch size {patch_size}, downsample ratio {downsample_ratio}): use a multiple of {token_side}",
            everywhere=True,
        )
    return (image_size // token_side) ** 2
