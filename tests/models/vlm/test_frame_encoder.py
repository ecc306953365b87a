"""FrameEncoder: composition, size, reproducible initialisation."""

import pytest
import torch

from megamed.models.projector import ProjectorConfig
from megamed.models.vision import VisionConfig
from megamed.models.vlm.encoder import FrameEncoder, init_frame_encoder
from megamed.utils import UserError


def tiny_encoder(num_layers: int = 2) -> FrameEncoder:
    vision = VisionConfig(
        hidden_size=32, num_layers=num_layers, num_heads=4, intermediate_size=48, image_size=56, qk_norm=True,
        layer_scale_init=0.3,
    )  # fmt: skip
    return FrameEncoder(vision, ProjectorConfig(vision_hidden_size=32, language_hidden_size=40))


def test_visual_tokens_come_frame_by_frame() -> None:
    encoder = tiny_encoder()
    init_frame_encoder(encoder, seed=0, std=0.2)
    frames_NCHW = torch.randn(3, 3, 56, 56)
    tokens = encoder(frames_NCHW)
    assert encoder.tokens_per_frame == 4
    assert tokens.shape == (12, 40)
    # Batched and single products may add in another order: float32 rounding of values of order 1.
    torch.testing.assert_close(tokens[4:8], encoder(frames_NCHW[1:2]), rtol=1e-5, atol=1e-5)
    assert encoder(torch.randn(1, 3, 112, 112)).shape == (16, 40)
    assert encoder(torch.empty(0, 3, 56, 56)).shape == (0, 40)


def test_internvl_26b_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert torch.empty(1).is_meta  # or the next line takes 23 GB
        encoder = FrameEncoder(VisionConfig(), ProjectorConfig())
    assert encoder.tokens_per_frame == 256
    # LayerNorm over 4 patches side by side, then two linear layers with bias.
    expected = 2 * 12800 + (12800 * 6144 + 6144) + (6144 * 6144 + 6144)
    assert sum(p.numel() for p in encoder.projector.parameters()) == expected
    # Everything is a parameter, so to_empty and init_frame_encoder leave nothing unset.
    assert not list(encoder.buffers())


def test_initial_values() -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(torch.nan)
    init_frame_encoder(encoder, seed=1, std=0.02)
    for name, parameter in encoder.named_parameters():
        if "layer_scale" in name:
            assert (parameter == 0.3).all(), name
        elif "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            # Standard error of a standard deviation from n values is std / sqrt(2 n): five of them.
            assert abs(parameter.std() / 0.02 - 1) < 5 / (2 * parameter.numel()) ** 0.5, name
            assert abs(parameter.mean()) < 5 * 0.02 / parameter.numel() ** 0.5, name


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    first, second, other, deeper = tiny_encoder(), tiny_encoder(), tiny_encoder(), tiny_encoder(num_layers=3)
    torch.manual_seed(11)
    init_frame_encoder(first, seed=5)
    torch.manual_seed(12)
    init_frame_encoder(second, seed=5)
    init_frame_encoder(other, seed=6)
    init_frame_encoder(deeper, seed=5)
    in_deeper = dict(deeper.named_parameters())
    in_second, in_other = dict(second.named_parameters()), dict(other.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, in_second[name]) and torch.equal(parameter, in_deeper[name]), name
        constant = bool((parameter == parameter.flatten()[0]).all())
        assert constant == torch.equal(parameter, in_other[name]), name
    layers = first.vision_tower.layers
    assert not torch.equal(layers[0].mlp.fc1.weight, layers[1].mlp.fc1.weight)
    # A change of the drawing would change every run that starts from a seed. 1e-7: the normal values are made
    # with log and cos, whose last bit differs between processors.
    drawn = first.vision_tower.class_token[0, 0, :3].tolist()
    assert drawn == pytest.approx([-0.0274045318, -0.0035266934, 0.0003097084], abs=1e-7)


def test_meta_device_then_memory_then_values() -> None:
    with torch.device("meta"):
        encoder = tiny_encoder()
    encoder.to_empty(device="cpu")
    init_frame_encoder(encoder, seed=5)
    usual = tiny_encoder().bfloat16()
    init_frame_encoder(usual, seed=5)
    for a, b in zip(encoder.parameters(), usual.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_widths_that_do_not_meet_are_refused() -> None:
    with pytest.raises(UserError, match="vision_hidden_size=64"):
        FrameEncoder(VisionConfig(32, 1, 4, 48), ProjectorConfig(64, 40))
