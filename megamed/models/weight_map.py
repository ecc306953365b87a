"""Parameter names of a published format and ours, as a table, and what carries it out.

A family's `hf.py` holds the table. Values are only renamed, concatenated and split: the round trip is exact.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megamed.utils import UserError


@dataclass(frozen=True)
class Rename:
    """One line of a table.

    Attributes:
        ours: our parameter's name; `{i}` stands for a layer's number.
        theirs: its name in the other format. Of several, ours is their concatenation along dimension 0, and
            all of them have the same size.
    """

    ours: str
    theirs: tuple[str, ...]


def _match(pattern: str, name: str) -> str | None:
    """What stands for `{i}` in `name` ("" where the pattern has none), or None if it does not match."""
    found = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), name)
    return None if found is None else "".join(found.groups())


def to_ours(table: Sequence[Rename], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of the other format to ours.

    Raises:
        UserError: a name is not in the table, or a part of one of our parameters is missing.
    """
    parts: dict[str, list[Tensor | None]] = {}
    for name, tensor in state_dict.items():
        for rename in table:
            matches = [_match(pattern, name) for pattern in rename.theirs]
            part = next((k for k, number in enumerate(matches) if number is not None), None)
            if part is not None:
                ours = rename.ours.replace("{i}", str(matches[part]))
                parts.setdefault(ours, [None] * len(rename.theirs))[part] = tensor
                break
        else:
            raise UserError(f"{name} in the checkpoint is unknown to this model family: check the model type")
    result = {}
    for ours, tensors in parts.items():
        present = [tensor for tensor in tensors if tensor is not None]
        if len(present) < len(tensors):
            raise UserError(f"the checkpoint lacks a part of {ours}: check that all its files are there")
        result[ours] = present[0] if len(present) == 1 else torch.cat(present)
    return result


def to_theirs(table: Sequence[Rename], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict of ours to the other format: the inverse of `to_ours`.

    Raises:
        UserError: a name is not in the table.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        for rename in table:
            number = _match(rename.ours, name)
            if number is not None:
                pieces = tensor.chunk(len(rename.theirs))
                result |= {t.replace("{i}", number): p for t, p in zip(rename.theirs, pieces, strict=True)}
                break
        else:
            raise UserError(f"{name} has no counterpart in the format asked for: check the model type")
    return result
