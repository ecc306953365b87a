"""Settings of a whole vision-language model."""

from dataclasses import dataclass, field

from megamed.models.language.config import LanguageConfig
from megamed.models.projector import ProjectorConfig
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

    def validate(self) -> None:
        """Check that the parts fit each other.

        Raises:
            UserError: names the two keys that differ.
        """
        pairs = [
            ("projector.vision_hidden_size", self.projector.vision_hidden_size, "vision.hidden_size", self.vision.hidden_size),
            (
                "projector.language_hidden_size",
                self.projector.language_hidden_size,
                "language.hidden_size",
                self.language.hidden_size,
            ),
        ]
        for name, value, other_name, other in pairs:
            if value != other:
                raise UserError(f"model.{name}={value} must equal model.{other_name}={other}", everywhere=True)
