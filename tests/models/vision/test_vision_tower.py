"""VisionTower on its own: sizes, empty batches, recomputation, refusals."""

import pytest
import torch

from megamed.models.vision import VisionConfig, VisionTower, internvit_300m
from megamed.models.vision.hf import from_hf, to_hf
from megamed.utils import UserError


def tiny(**changes) -> VisionConfig:
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48, "image_size": 56}
    return VisionConfig(**(shape | changes))


def randomised(config: VisionConfig) -> VisionTower:
    torch.manual_seed(3)
    tower = VisionTower(config)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower


def test_internvit_6b_parameter_count() -> None:
    hidden, inner, layers = 3200, 12800, 45
    layer = (
        3 * hidden * hidden  # q, k and v, no bias
        + hidden * hidden + hidden  # projection
        + hidden * inner + inner + inner * hidden + hidden  # MLP
        + 2 * hidden  # norms before attention and MLP, weight only
        + 2 * hidden  # norms of q and k
        + 2 * hidden  # layer scales
    )  # fmt: skip
    # Patches with bias, class token, positions of the class token and of 32 x 32 patches.
    embedding = (3 * 14 * 14 * hidden + hidden) + hidden + (1 + 32 * 32) * hidden
    with torch.device("meta"):
        assert torch.empty(1).is_meta  # or the next line takes 22 GB
        tower = VisionTower(VisionConfig())
    # The model card gives 5540 million.
    assert sum(p.numel() for p in tower.parameters()) == layers * layer + embedding == 5_536_496_000


def test_internvit_300m_parameter_count() -> None:
    hidden, inner, layers = 1024, 4096, 24
    # Weights and biases of qkv, projection and MLP; two LayerNorms; two layer scales.
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden + 2 * hidden
    embedding = (3 * 14 * 14 * hidden + hidden) + hidden + (1 + 32 * 32) * hidden
    with torch.device("meta"):
        tower = VisionTower(internvit_300m())
    # The model card gives 304 million.
    assert sum(p.numel() for p in tower.parameters()) == layers * layer + embedding == 304_012_288


@pytest.mark.parametrize("recompute", [False, True])
def test_no_frames(recompute: bool) -> None:
    tower = VisionTower(tiny(recompute=recompute))
    assert tower(torch.empty(0, 3, 56, 56)).shape == (0, 17, 32)
    assert tower(torch.empty(0, 3, 84, 84)).shape == (0, 37, 32)


def test_frames_do_not_see_each_other() -> None:
    tower = randomised(tiny())
    frames_NCHW = torch.randn(3, 3, 56, 56)
    # Batched and single products may add in another order: float32 rounding of values of order 1.
    torch.testing.assert_close(tower(frames_NCHW)[1:2], tower(frames_NCHW[1:2]), rtol=1e-5, atol=1e-5)


def test_recompute_changes_nothing_but_memory() -> None:
    frames_NCHW = torch.randn(2, 3, 56, 56)
    results, num_saved = [], []
    for recompute in (False, True):
        tower = randomised(tiny(recompute=recompute, qk_norm=True, norm="rms_norm"))
        sizes: list[int] = []

        def count(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            out = tower(frames_NCHW)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in tower.parameters())])
        num_saved.append(sum(sizes))
    # The same operations on the same values: bit for bit.
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))
    assert num_saved[1] < num_saved[0] / 4


def test_bfloat16_follows_float32() -> None:
    tower = randomised(tiny(qk_norm=True, norm="rms_norm"))
    frames_NCHW = torch.randn(2, 3, 84, 84)
    expected = tower(frames_NCHW)
    out = tower.bfloat16()(frames_NCHW)
    assert out.dtype == torch.bfloat16
    # bfloat16 has 8 bits: 0.4 % a step, on values up to 3 or so, through two layers.
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("shape", [(56, 70), (60, 60)])
def test_frames_that_are_not_whole_squares_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"multiple of 14"):
        VisionTower(tiny())(torch.zeros(1, 3, *shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads"),
        ({"norm": "batch_norm"}, "rms_norm or layer_norm"),
        ({"output_layer": 3}, "from -3 to 2"),
        ({"output_layer": -4}, "from -3 to 2"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        VisionTower(tiny(**changes))


def test_foreign_and_incomplete_checkpoints_are_refused() -> None:
    weights = to_hf(VisionTower(tiny()).state_dict())
    with pytest.raises(UserError, match="mask_token"):
        from_hf({**weights, "embeddings.mask_token": torch.zeros(1, 1, 32)})
    del weights["encoder.layer.1.attention.k_proj.weight"]
    with pytest.raises(UserError, match=r"layers\.1\.attention\.qkv\.weight"):
        from_hf(weights)
    with pytest.raises(UserError, match="lm_head"):
        to_hf({"lm_head.weight": torch.zeros(1)})
