"""Projectors between the vision tower and the language model."""

from megamed.models.projector.config import ProjectorConfig, tokens_per_frame
from megamed.models.projector.model import Projector, pixel_shuffle

__all__ = ["Projector", "ProjectorConfig", "pixel_shuffle", "tokens_per_frame"]
