"""Projector weights to and from transformers' native `InternVLMultiModalProjector`."""

from collections.abc import Mapping

from torch import Tensor

from megamed.models.weight_map import Rename, to_ours, to_theirs

# Names within the projector: `model.multi_modal_projector.` is taken off and put back by the caller.
TABLE = (
    Rename("norm.weight", ("layer_norm.weight",)),
    Rename("norm.bias", ("layer_norm.bias",)),
    Rename("fc1.weight", ("linear_1.weight",)),
    Rename("fc1.bias", ("linear_1.bias",)),
    Rename("fc2.weight", ("linear_2.weight",)),
    Rename("fc2.bias", ("linear_2.bias",)),
)


def from_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of an `InternVLMultiModalProjector` to that of a `Projector`.

    Raises:
        UserError: a name that the projector does not have.
    """
    return to_ours(TABLE, state_dict)


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a `Projector` to that of an `InternVLMultiModalProjector`.

    Raises:
        UserError: a name that is not a projector's.
    """
    return to_theirs(TABLE, state_dict)
