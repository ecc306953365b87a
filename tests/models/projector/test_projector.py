"""The projector and its pixel shuffle. Its parity with transformers is in test_vision_parity.py."""

import pytest
import torch
from transformers.models.internvl.modeling_internvl import InternVLModel

from megamed.models.projector import Projector, ProjectorConfig, pixel_shuffle, tokens_per_frame
from megamed.models.projector.hf import from_hf, to_hf
from megamed.utils import UserError


@pytest.mark.parametrize("side", [1, 2, 4])
def test_pixel_shuffle_equals_transformers_exactly(side: int) -> None:
    patches_NPD = torch.arange(2 * 64 * 4, dtype=torch.float32).reshape(2, 64, 4)
    expected = InternVLModel.pixel_shuffle(None, patches_NPD.reshape(2, 8, 8, 4), scale_factor=1 / side)
    assert torch.equal(pixel_shuffle(patches_NPD, side), expected.flatten(1, 2))


def test_pixel_shuffle_by_hand() -> None:
    # Patches 0 to 15 on a 4 x 4 grid: the second token is the upper right block, row by row.
    tokens = pixel_shuffle(torch.arange(16.0).reshape(1, 16, 1), 2)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7]


def test_shapes_also_without_frames() -> None:
    projector = Projector(ProjectorConfig(vision_hidden_size=6, language_hidden_size=10))
    assert projector(torch.randn(3, 16, 6)).shape == (3, 4, 10)
    assert projector(torch.empty(0, 16, 6)).shape == (0, 4, 10)


def test_tokens_per_frame() -> None:
    assert tokens_per_frame(448, 14) == 256
    assert tokens_per_frame(224, 14) == 64
    assert tokens_per_frame(448, 14, downsample_ratio=0.25) == 64
    with pytest.raises(UserError, match="multiple of 28"):
        tokens_per_frame(434, 14)


@pytest.mark.parametrize("ratio", [0.3, 0.0, -0.5, 2.0])
def test_ratio_that_is_not_one_over_a_whole_number_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match="downsample_ratio"):
        Projector(ProjectorConfig(6, 10, downsample_ratio=ratio))


def test_ratio_of_a_third_is_taken_in_decimal() -> None:
    assert tokens_per_frame(42, 14, 0.3333333333) == 1


@pytest.mark.parametrize("num_patches", [15, 17, 9])
def test_grids_that_do_not_divide_are_refused(num_patches: int) -> None:
    with pytest.raises(UserError, match="square"):
        pixel_shuffle(torch.zeros(1, num_patches, 4), 2)


def test_weights_round_trip() -> None:
    ours = Projector(ProjectorConfig(6, 10)).state_dict()
    theirs = to_hf(ours)
    assert set(theirs) == {
        f"{layer}.{kind}" for layer in ("layer_norm", "linear_1", "linear_2") for kind in ("weight", "bias")
    }
    back = from_hf(theirs)
    assert back.keys() == ours.keys()
    assert max((back[name] - tensor).abs().max() for name, tensor in ours.items()) == 0
