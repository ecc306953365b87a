"""Projector weights to and from InternVL's: transformers' `InternVLMultiModalProjector`, and `mlp1` of the releases."""

from collections.abc import Mapping

from torch import Tensor

from megamed.models.weight_map import Line, Table, to_ours, to_theirs

# Names within the projector: what is in front of it (`multi_modal_projector.`, `mlp1.`) is the family's.
_TRANSFORMERS = {"norm": "layer_norm", "fc1": "linear_1", "fc2": "linear_2"}
_RELEASED = {"norm": "0", "fc1": "1", "fc2": "3"}


def _table(names: Mapping[str, str]) -> Table:
    kinds = ("weight", "bias")
    return Table(tuple(Line(f"{ours}.{kind}", (f"{names[ours]}.{kind}",)) for ours in names for kind in kinds))


TRANSFORMERS, RELEASED = _table(_TRANSFORMERS), _table(_RELEASED)


def from_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an `InternVLMultiModalProjector` to that of a `Projector`.

    Raises:
        UserError: a name that the projector does not have.
    """
    return to_ours(TRANSFORMERS, state_dict)


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `Projector` to that of an `InternVLMultiModalProjector`.

    Raises:
        UserError: a name that is not a projector's.
    """
    return to_theirs(TRANSFORMERS, state_dict)
