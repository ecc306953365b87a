"""VisionTower and Projector against transformers' native InternVL classes, with random weights."""

import pytest
import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig, InternVLVisionModel, Qwen2Config
from transformers.models.internvl.modeling_internvl import InternVLModel

from megamed.models.projector import ProjectorConfig
from megamed.models.projector import hf as projector_hf
from megamed.models.vision import VisionConfig, VisionTower
from megamed.models.vision import hf as vision_hf
from megamed.models.vlm.encoder import FrameEncoder

# Both sides compute in float32 with values of order 1, and differ in the order of sums only (one product for
# q, k and v; the patch convolution as a product; norms written differently): some 1e-6 after three layers.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
FLAVOURS = {
    "300m": {"norm": "layer_norm", "qkv_bias": True, "qk_norm": False},
    "6b": {"norm": "rms_norm", "qkv_bias": False, "qk_norm": True},
}
SIZES = (56, 84, 28)  # native; larger; smaller


def our_config(flavour: str, **changes) -> VisionConfig:
    shape = {"hidden_size": 48, "num_layers": 3, "num_heads": 3, "intermediate_size": 80, "image_size": 56}
    return VisionConfig(**shape, **FLAVOURS[flavour], **changes)


def their_config(config: VisionConfig) -> InternVLVisionConfig:
    theirs = InternVLVisionConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        attention_bias=config.qkv_bias,
        use_qk_norm=config.qk_norm,
        norm_type=config.norm,
        layer_norm_eps=config.norm_eps,
        layer_scale_init_value=config.layer_scale_init,
        use_mean_pooling=not config.final_norm,
    )
    theirs._attn_implementation = "sdpa"
    return theirs


def randomise(module: nn.Module) -> None:
    """Random values everywhere, so that no parameter can be swapped or forgotten unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.5 + 0.2 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.dim() != 3 else 1
                parameter.copy_(noise / fan_in**0.5)


def vision_pair(config: VisionConfig) -> tuple[VisionTower, InternVLVisionModel]:
    theirs = InternVLVisionModel(their_config(config))
    randomise(theirs)
    ours = VisionTower(config)
    num_layers = None if config.output_layer == -1 else config.num_layers_run
    ours.load_state_dict(vision_hf.from_hf(theirs.state_dict(), num_layers))
    return ours, theirs


def frames(num_frames: int, size: int) -> Tensor:
    return torch.randn(num_frames, 3, size, size, generator=torch.Generator().manual_seed(size))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values())
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        # Relative to the largest entry: an entry near 0 is a difference of large terms.
        assert (grad - theirs[name]).abs().max() <= 1e-5 * theirs[name].abs().max(), name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_outputs_and_gradients_equal_transformers(flavour: str, size: int) -> None:
    ours, theirs = vision_pair(our_config(flavour))
    frames_NCHW = frames(2, size)
    out, expected = ours(frames_NCHW), theirs(frames_NCHW).last_hidden_state
    assert out.shape == (2, 1 + (size // 14) ** 2, 48)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_same_gradients(gradients(ours), vision_hf.from_hf(gradients(theirs)))


@pytest.mark.parametrize("size", SIZES)
def test_positions_equal_transformers_exactly(size: int) -> None:
    ours, theirs = vision_pair(our_config("300m"))
    grid = size // 14
    expected = theirs.embeddings.interpolate_pos_encoding(torch.empty(1, 1 + grid * grid, 48), size, size)
    # The same operations in the same order.
    assert torch.equal(ours.position_embedding(grid), expected)


@pytest.mark.parametrize("output_layer", [0, 2, 3, -1, -2, -4])
def test_output_layer_is_that_hidden_state(output_layer: int) -> None:
    ours, theirs = vision_pair(our_config("6b", output_layer=output_layer))
    expected = theirs(frames(1, 56), output_hidden_states=True).hidden_states[output_layer]
    assert len(ours.layers) == output_layer % 4
    torch.testing.assert_close(ours(frames(1, 56)), expected, **TOLERANCE)


@pytest.mark.parametrize("output_layer", [-1, -2, 3])
def test_final_norm_is_on_the_last_hidden_state_only(output_layer: int) -> None:
    ours, theirs = vision_pair(our_config("300m", final_norm=True, output_layer=output_layer))
    outputs = theirs(frames(1, 56), output_hidden_states=True)
    expected = outputs.last_hidden_state if output_layer == -1 else outputs.hidden_states[output_layer]
    torch.testing.assert_close(ours(frames(1, 56)), expected, **TOLERANCE)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_frame_encoder_equals_transformers(flavour: str) -> None:
    config = our_config(flavour)
    text = Qwen2Config(
        hidden_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=8, vocab_size=16,
    )  # fmt: skip
    theirs = InternVLModel(InternVLConfig(vision_config=their_config(config), text_config=text))
    randomise(theirs)
    ours = FrameEncoder(config, ProjectorConfig(config.hidden_size, 40))
    ours.vision_tower.load_state_dict(vision_hf.from_hf(theirs.vision_tower.state_dict()))
    ours.projector.load_state_dict(projector_hf.from_hf(theirs.multi_modal_projector.state_dict()))
    for size in SIZES:
        tokens = ours(frames(3, size))
        expected = theirs.get_image_features(frames(3, size), return_dict=True).pooler_output
        torch.testing.assert_close(tokens, expected.flatten(0, 1), **TOLERANCE)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    (tokens * weight).sum().backward()
    (expected.flatten(0, 1) * weight).sum().backward()
    assert_same_gradients(gradients(ours.vision_tower), vision_hf.from_hf(gradients(theirs.vision_tower)))
    assert_same_gradients(
        gradients(ours.projector), projector_hf.from_hf(gradients(theirs.multi_modal_projector))
    )


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_vision_weights_round_trip(flavour: str, final_norm: bool) -> None:
    ours, theirs = vision_pair(our_config(flavour, final_norm=final_norm))
    back = vision_hf.to_hf(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert max((back[name] - tensor).abs().max() for name, tensor in theirs.state_dict().items()) == 0
    again = vision_hf.from_hf(back)
    assert again.keys() == ours.state_dict().keys()
    assert max((again[name] - tensor).abs().max() for name, tensor in ours.state_dict().items()) == 0
