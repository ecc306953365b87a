"""Frame encoder: what turns frames into visual tokens, and its initialisation.

Shapes: N frames; C channels, H and W pixels; P patches, D vision hidden size; T visual tokens of a frame;
E language hidden size.
"""

import hashlib

import torch
from torch import Tensor, nn

from megamed.models.projector import Projector, ProjectorConfig, tokens_per_frame
from megamed.models.vision import VisionConfig, VisionTower
from megamed.utils import UserError


class FrameEncoder(nn.Module):
    """Vision tower and projector.

    The largest ones are best built under `torch.device("meta")`, given memory by `to_empty` and set by
    `init_frame_encoder` or a checkpoint: there are no buffers, so that sets everything.
    """

    def __init__(self, vision: VisionConfig, projector: ProjectorConfig):
        super().__init__()
        if projector.vision_hidden_size != vision.hidden_size:
            raise UserError(
                f"model.projector.vision_hidden_size={projector.vision_hidden_size} must equal "
                f"model.vision.hidden_size={vision.hidden_size}",
                everywhere=True,
            )
        self.vision_tower = VisionTower(vision)
        self.projector = Projector(projector)

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame of the native size, `vision.image_size`."""
        vision, projector = self.vision_tower.config, self.projector.config
        return tokens_per_frame(vision.image_size, vision.patch_size, projector.downsample_ratio)

    def forward(self, frames_NCHW: Tensor) -> Tensor:
        """Encode square frames (N may be 0) to visual tokens [N * T, E], frame by frame, row by row."""
        patches_NPD = self.vision_tower(frames_NCHW)[:, 1:]
        return self.projector(patches_NPD).flatten(0, 1)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    # Torch takes seeds below 2**63.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def init_frame_encoder(module: FrameEncoder, seed: int, std: float = 0.02) -> None:
    """Set every parameter: weights and embeddings normal, biases 0, norms 1, layer scale as configured.

    Each parameter is drawn on the CPU in float32 from a generator of its own, seeded by `seed` and the
    parameter's name. So a value does not depend on the order of modules, on the rank, or on the device, and
    for a narrower dtype it is the rounded float32 value.

    Args:
        module: the encoder itself, not a wrapper, which would change the names.
        seed: any whole number.
        std: standard deviation of the normal distribution.
    """
    norms = (nn.LayerNorm, nn.RMSNorm)
    norm_weights = {f"{name}.weight" for name, child in module.named_modules() if isinstance(child, norms)}
    for name, parameter in module.named_parameters():
        if name in norm_weights:
            parameter.fill_(1.0)
        elif name.endswith(".bias"):
            parameter.zero_()
        elif name.endswith((".layer_scale1", ".layer_scale2")):
            parameter.fill_(module.vision_tower.config.layer_scale_init)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=_generator(seed, name)))
