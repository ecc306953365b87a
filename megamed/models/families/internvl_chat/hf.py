"""Weights of the InternVL releases with code of their own: InternVL 1.5 to 3.5, `InternVLChatModel`."""

from collections.abc import Collection

from megamed.models.language import hf as language
from megamed.models.projector import hf as projector
from megamed.models.vision import hf as vision
from megamed.models.vlm import VLMConfig
from megamed.models.weight_map import Table


def table(model: VLMConfig, decoder: language.Family, names: Collection[str] = ()) -> Table:
    """Their files' names and ours.

    Args:
        model: its sizes.
        decoder: whose names the language model's weights have.
        names: in the files; without meaning here.
    """
    return (
        language.table(model.language, decoder).within("language.", "language_model.")
        + vision.RELEASED.within("vision.vision_tower.", "vision_model.")
        + projector.RELEASED.within("vision.projector.", "mlp1.")
    )
