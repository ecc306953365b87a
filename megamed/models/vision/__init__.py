"""Vision towers."""

from megamed.models.vision.config import VisionConfig, internvit_300m
from megamed.models.vision.model import VisionTower

__all__ = ["VisionConfig", "VisionTower", "internvit_300m"]
