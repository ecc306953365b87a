"""Weights of InternVL in the format of transformers: `InternVLForConditionalGeneration`."""

from collections.abc import Collection

from megamed.models.language import hf as language
from megamed.models.projector import hf as projector
from megamed.models.vision import hf as vision
from megamed.models.vlm import VLMConfig
from megamed.models.weight_map import Table

# What files begin their names with, and what the modules have instead, as some files do.
_IN_MODULES = {
    "language_model.model.": "model.language_model.",
    "language_model.": "",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def table(model: VLMConfig, decoder: language.Family, names: Collection[str] = ()) -> Table:
    """Their files' names and ours.

    Args:
        model: its sizes.
        decoder: whose names the language model's weights have.
        names: in the files, which tell the two ways of writing them apart.
    """
    whole = (
        language.table(model.language, decoder).within("language.", "language_model.")
        + vision.TRANSFORMERS.within("vision.vision_tower.", "vision_tower.")
        + projector.TRANSFORMERS.within("vision.projector.", "multi_modal_projector.")
    )
    return whole.renamed(_IN_MODULES) if any(name.startswith("model.") for name in names) else whole
