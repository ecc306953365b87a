"""Settings of a whole vision-language model."""

from dataclasses import dataclass, field

from megamed.models.language.config import LanguageConfig
from megamed.models.projector import ProjectorConfig, tokens_per_frame
from megamed.models.vision import VisionConfig
from megamed.utils import UserError


@dataclass
class VLMConfig:
    """An InternVL: vision tower, projector, language model."""

    name: str = "internvl"
    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    frames_per_pass: int = 64
    """Frames that a rank encodes at once."""
    frames_in_flight: int | None = 64
    """Frames of a rank whose activations are alive at any time; `frames_per_pass` never exceeds it. The frames
    of a step beyond it are encoded without activations, and again in the backward pass, which costs at most
    a third more of the encoder's FLOPs. None keeps the activations of all frames. The default is bounded
    because the longest study of a data set then makes a step slower, where it would else end the job."""

    @property
    def tokens_per_frame(self) -> int:
        """Visual tokens of a frame."""
        return tokens_per_frame(self.vision.image_size, self.vision.patch_size, self.projector.downsample_ratio)

    def validate(self) -> None:
        """Check that the parts fit each other.

        Raises:
            UserError: names the two keys that differ.
        """
        for part, other in (("vision", self.vision), ("language", self.language)):
            key = f"{part}_hidden_size"
            value = getattr(self.projector, key)
            if value != other.hidden_size:
                raise UserError(
                    f"model.projector.{key}={value} must equal model.{part}.hidden_size={other.hidden_size}",
                    everywhere=True,
                )
