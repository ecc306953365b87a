"""How a model is placed on the mesh: the vision phase, data parallelism, layout-independent weights."""

from megamed.parallel.placement import PlacedModel, place
from megamed.parallel.vision_phase import VisionPhase

__all__ = ["PlacedModel", "VisionPhase", "place"]
