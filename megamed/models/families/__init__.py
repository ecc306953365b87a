"""Families of published vision-language models: how their config.json and their weights correspond to ours.

A family is a folder with `config.py` (settings) and `hf.py` (the table of weights).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from megamed.models.families.internvl import config as internvl_config
from megamed.models.families.internvl import hf as internvl_hf
from megamed.models.families.internvl_chat import config as internvl_chat_config
from megamed.models.families.internvl_chat import hf as internvl_chat_hf
from megamed.models.language.hf import Family as Decoder
from megamed.models.vlm import VLMConfig
from megamed.models.weight_map import Table
from megamed.utils import UserError

__all__ = ["Family", "INTERNVL", "family_of"]


@dataclass(frozen=True)
class Family:
    """What there is to know of a family.

    Attributes:
        name: its `model_type`.
        architecture: its class.
        read_config: config.json and names of tensors, to a model.
        decoder_of: whose names the language model's weights have.
        table: names of weights, of a model, its decoder, and the names in the files.
    """

    name: str
    architecture: str
    read_config: Callable[[dict[str, Any], Collection[str]], VLMConfig]
    decoder_of: Callable[[dict[str, Any]], Decoder]
    table: Callable[[VLMConfig, Decoder, Collection[str]], Table]


INTERNVL = Family(
    "internvl", "InternVLForConditionalGeneration",
    internvl_config.read_config, internvl_config.decoder_of, internvl_hf.table,
)  # fmt: skip
_FAMILIES = (
    INTERNVL,
    Family(
        "internvl_chat", "InternVLChatModel",
        internvl_chat_config.read_config, internvl_chat_config.decoder_of, internvl_chat_hf.table,
    ),
)  # fmt: skip


def family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: there is none of it, or the model is quantised.
    """
    architectures = config.get("architectures") or [""]
    for family in _FAMILIES:
        if config.get("model_type") == family.name or family.architecture in architectures:
            if quantised := config.get("quantization_config"):
                method = quantised.get("quant_method", "an unknown method")
                raise UserError(
                    f"config.json: the model is quantised ({method}), and rounding cannot be taken back; download the "
                    "release in bf16"
                )
            return family
    known = ", ".join(family.architecture for family in _FAMILIES)
    what = architectures[0] or config.get("model_type")
    raise UserError(f"config.json: is of {what}, an unknown architecture; known are {known}")
