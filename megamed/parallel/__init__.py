"""How a model is placed on the mesh: vision phase, language phase, data parallelism, layout-independent weights."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.parallel.language_phase import LanguageInput, language_input, run_schedule, trim_padding
from megamed.parallel.placement import PlacedModel, place
from megamed.parallel.vision_phase import VisionPhase

__all__ = ["LanguageInput", "PlacedModel", "VisionPhase", "language_input", "place", "run_schedule", "trim_padding"]
