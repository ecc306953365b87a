"""RoPE's frequencies and tables against transformers, Megatron and arithmetic in Python's own floats.

Shapes: T tokens, N heads, D head width, F = D / 2 frequencies.
"""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llamas_rope

from megamed.config import load
from megamed.models.language import LanguageConfig
from megamed.models.language.rotary import RotaryConfig, inverse_frequencies, rotary_table, rotate
from megamed.runtime import ParallelConfig
from megamed.utils import UserError

CPU = torch.device("cpu")
# InternLM2-20B's heads, its base and its longest document.
HEAD_DIM, BASE, ORIGINAL = 128, 1e6, 32768


def their_config(head_dim: int, base: float, max_positions: int, scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": base, **scaling},
    )


def their_frequencies(config: LlamaConfig, num_positions: int | None = None) -> tuple[Tensor, float]:
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, CPU, seq_len=num_positions)


# Ours, and what transformers calls the same.
SCALINGS: dict[str, tuple[RotaryConfig, dict[str, Any]]] = {
    "linear": (RotaryConfig(BASE, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        RotaryConfig(BASE, "yarn", 4.0, ORIGINAL),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    ),
    "yarn-bounds": (
        RotaryConfig(BASE, "yarn", 40.0, 4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
         "beta_slow": 2.0, "attention_factor": 1.25},
    ),
    "yarn-mscale": (
        RotaryConfig(1e4, "yarn", 40.0, 4096, mscale=1.5, mscale_all_dim=0.7),
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.5,
         "mscale_all_dim": 0.7},
    ),
    # The range of the mixture ends behind the last frequency ...
    "yarn-small-base": (
        RotaryConfig(1e3, "yarn", 4.0, ORIGINAL),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    ),
    # ... or at the first one, with which it begins.
    "yarn-no-mixture": (
        RotaryConfig(1e4, "yarn", 4.0, 6),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6},
    ),
    "llama3": (
        RotaryConfig(5e5, "llama3", 8.0, 8192),
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0},
    ),
    "llama3-factors": (
        RotaryConfig(5e5, "llama3", 32.0, 8192, low_freq_factor=2.0, high_freq_factor=6.0),
        {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, "low_freq_factor": 2.0,
         "high_freq_factor": 6.0},
    ),
}  # fmt: skip


def assert_same_frequencies(found_F: Tensor, expected_F: Tensor) -> None:
    assert found_F.dtype == torch.float64
    # Theirs are float32: an exponent whose rounding counts ln(base) = 14 times, a power, a quotient, a mixture,
    # each with steps of 6e-8. The largest difference found is 9e-7.
    torch.testing.assert_close(found_F.float(), expected_F, rtol=2e-6, atol=0)


@pytest.mark.parametrize("head_dim", [HEAD_DIM, 96, 16])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str, head_dim: int) -> None:
    ours, scaling = SCALINGS[name]
    theirs = their_config(head_dim, ours.base, ORIGINAL, scaling)
    found_F, found = inverse_frequencies(ours, head_dim, CPU)
    expected_F, expected = their_frequencies(theirs)
    assert_same_frequencies(found_F, expected_F)
    assert found == pytest.approx(expected, rel=1e-12)  # the same logarithms, in Python on both sides
    plain_F, one = inverse_frequencies(RotaryConfig(ours.base), head_dim, CPU)
    assert one == 1
    if name != "yarn-small-base":  # whose lowest frequency, too, turns within the original length
        assert float(plain_F[-1] / found_F[-1]) == pytest.approx(ours.factor, rel=1e-12)


@pytest.mark.parametrize(
    ("dynamic", "length"), [(2.0, 2 * ORIGINAL), (3.0, 3 * ORIGINAL), (3.0, 80_000), (2.0, ORIGINAL * 3 // 2)]
)
def test_ntk_is_dynamic_at_one_length(dynamic: float, length: int) -> None:
    """transformers' `dynamic` changes the base with every length; ours is what it has at one of them."""
    theirs = their_config(HEAD_DIM, BASE, ORIGINAL, {"rope_type": "dynamic", "factor": dynamic})
    growth = dynamic * length / ORIGINAL - (dynamic - 1)
    found_F, one = inverse_frequencies(RotaryConfig(BASE, "ntk", growth), HEAD_DIM, CPU)
    assert_same_frequencies(found_F, their_frequencies(theirs, length)[0])
    assert one == 1
    # The two factors are one number only at (2 - 1 / factor) times the original length ...
    assert (growth == dynamic) == (length == ORIGINAL * (2 - 1 / dynamic))
    # ... and up to the original length, theirs is no scaling at all.
    plain_F, _ = inverse_frequencies(RotaryConfig(BASE), HEAD_DIM, CPU)
    assert_same_frequencies(plain_F, their_frequencies(theirs, ORIGINAL)[0])
    # As described: the highest frequency as it was, the lowest divided by the factor.
    assert found_F[0] == plain_F[0] and float(plain_F[-1] / found_F[-1]) == pytest.approx(growth, rel=1e-12)


def exact_table(positions: list[int], base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, F] in Python's floats: exact to 1e-9, some ten roundings of an angle of 1.4e6."""
    angles = [[position * base ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)] for position in positions]
    cos, sin = ([[function(angle) for angle in row] for row in angles] for function in (math.cos, math.sin))
    return torch.tensor(cos, dtype=torch.float64), torch.tensor(sin, dtype=torch.float64)


def split(cos_T1D: Tensor, sin_T1D: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, F] of a table, after a look at its other half."""
    (cos, again), (minus, sin) = cos_T1D.squeeze(1).chunk(2, -1), sin_T1D.squeeze(1).chunk(2, -1)
    assert torch.equal(cos, again) and torch.equal(sin, -minus)
    return cos.double(), sin.double()


def their_table(positions: list[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, F] as transformers has them."""
    config = their_config(HEAD_DIM, BASE, ORIGINAL, {"rope_type": "default"})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([positions]))
    return cos[0, :, : HEAD_DIM // 2].double(), sin[0, :, : HEAD_DIM // 2].double()


def largest_error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))


def test_positions_above_a_million_are_exact() -> None:
    positions = [1_000_000, 1_000_001, 1_399_999, 1_400_000]
    exact = exact_table(positions, BASE)
    table = rotary_table(torch.tensor(positions), HEAD_DIM, RotaryConfig(BASE), torch.float32)
    ours, theirs = largest_error(split(*table), exact), largest_error(their_table(positions), exact)
    print(f"largest error of a cosine or sine: megamed {ours:.1e}, float32 angles {theirs:.1e}")
    assert ours < 1e-7  # 6e-8 / 2 is the rounding of a float32 near 1
    assert theirs > 0.02  # as large as a step of the angle, which is 0.06 to 0.13 rad there, suggests


def test_near_positions_are_those_of_transformers() -> None:
    positions = list(range(64))
    table = rotary_table(torch.tensor(positions), HEAD_DIM, RotaryConfig(BASE), torch.float32)
    # Their angles are off by a few parts in 1e7: of 63 rad, at most 1.5e-5.
    assert largest_error(split(*table), their_table(positions)) < 1.5e-5


def test_positions_come_in_any_order_and_may_repeat() -> None:
    positions = torch.tensor([7, 0, 1_200_000, 7, 3])
    cos, sin = rotary_table(positions, 16, RotaryConfig(), torch.float32)
    assert cos.shape == sin.shape == (5, 1, 16)
    for i, position in enumerate(positions):
        alone = rotary_table(position[None], 16, RotaryConfig(), torch.float32)
        # The same, but for the last bit: vector and scalar code of the cosine may differ in it.
        torch.testing.assert_close((cos[i], sin[i]), (alone[0][0], alone[1][0]), rtol=0, atol=1e-7)
    assert torch.equal(cos[1], torch.ones(1, 16)) and not sin[1].any()
    assert rotary_table(positions, 16, RotaryConfig(), torch.bfloat16)[0].dtype == torch.bfloat16


def draw(num_heads: int, num_tokens: int, head_dim: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_heads, head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation_is_transformers(name: str) -> None:
    """The attention factor too, which transformers has in its cosines and sines."""
    ours, scaling = SCALINGS[name]
    x_TND, position_T = draw(3, 24), torch.arange(24)
    cos, sin = LlamaRotaryEmbedding(their_config(16, ours.base, ORIGINAL, scaling))(x_TND, position_T[None])
    expected, _ = llamas_rope(x_TND.transpose(0, 1)[None], x_TND.transpose(0, 1)[None], cos, sin)
    found = rotate(x_TND, *rotary_table(position_T, 16, ours, torch.float32))
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)  # angles up to 24 rad


def test_rotation_is_megatrons_in_every_document() -> None:
    lengths, base = (5, 1, 17, 40), 1e4
    x_TND = draw(3, sum(lengths)).requires_grad_()
    y_TND = x_TND.detach().clone().requires_grad_()
    position_T = torch.cat([torch.arange(length) for length in lengths])
    found = rotate(x_TND, *rotary_table(position_T, 16, RotaryConfig(base), torch.float32))

    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    frequency = 1 / base ** (torch.arange(0, 16, 2).float() / 16)
    angle = torch.outer(torch.arange(max(lengths)).float(), frequency)
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config: Any = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    expected = apply_rotary_pos_emb(y_TND, torch.cat((angle, angle), -1)[:, None, None], config, bounds, cp_group=alone)
    weight = draw(3, sum(lengths), seed=1)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    # Their angles, of up to 39 rad, are float32: off by up to 2e-6, of entries of up to 4.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_TND.grad, y_TND.grad, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_only_a_million_positions_on() -> None:
    """RoPE's point, and what float32 angles lose."""
    q_TND, k_TND = draw(1, 1, HEAD_DIM, seed=1), draw(1, 1, HEAD_DIM, seed=2)

    def score(position: int) -> float:
        table = rotary_table(torch.tensor([position, position - 37]), HEAD_DIM, RotaryConfig(BASE), torch.float32)
        q, k = (rotate(x, *(part[i : i + 1] for part in table)) for i, x in enumerate((q_TND, k_TND)))
        return float((q * k).sum())

    assert score(1_300_000) == pytest.approx(score(50), abs=1e-5)  # sums of 128 products of order 1, in float32
    assert abs(score(51) - score(50)) < 1e-5 and abs(score(50)) > 0.1


YARN = {"scaling": "yarn", "factor": 4.0, "original_max_positions": ORIGINAL}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base": 1.0}, "base=1 has to be above 1"),
        ({"scaling": "yarn", "factor": 4.0}, "original_max_positions=null has to be the longest document"),
        ({"scaling": "linear"}, "factor=1 has to be above 1 with scaling=linear"),
        ({"factor": 2.0}, "factor=2 is not read by scaling=none; .* linear or ntk or yarn or llama3"),
        ({"scaling": "ntk", "factor": 2.0, "beta_fast": 16.0}, "beta_fast=16 is not read by scaling=ntk"),
        ({**YARN, "low_freq_factor": 2.0}, "low_freq_factor=2 is not read by scaling=yarn; .* set scaling to llama3"),
        ({**YARN, "beta_slow": 33.0}, "beta_slow=33 has to be above 0 and below beta_fast=32"),
        ({**YARN, "attention_factor": 0.0}, "attention_factor=0 has to be above 0"),
        ({**YARN, "mscale": 1.0}, "mscale_all_dim=null has to be given together with mscale"),
        ({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0}, "attention_factor=1 has to be left"),
        ({**YARN, "scaling": "llama3", "high_freq_factor": 0.5}, "low_freq_factor=1 .* below high_freq_factor=0.5"),
        ({"scaling": "dynamic"}, "scaling: 'dynamic' is no choice; .*'ntk'"),
        ({"bases": 1e4}, r"bases: no such key; did you mean model.language.rotary.base\?"),
        ({"rope_theta": 1e4}, "rope_theta: no such key; valid keys: base, scaling"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"model.language.rotary.{message}"):
        load(LanguageConfig, {"rotary": values}, "model.language")


def test_settings_load() -> None:
    loaded = load(LanguageConfig, {"rotary": YARN}, "model.language").rotary
    assert loaded == RotaryConfig(1e6, "yarn", 4.0, ORIGINAL) and replace(loaded, factor=2.0).factor == 2


def test_heads_that_have_no_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="heads of width 15 cannot be rotated"):
        LanguageConfig(head_dim=15).validate(ParallelConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_the_same_tables() -> None:
    positions = torch.tensor([0, 1, 4097, 1_000_000, 1_400_000])
    for ours, _ in SCALINGS.values():
        expected = rotary_table(positions, HEAD_DIM, ours, torch.float32)
        found = rotary_table(positions.cuda(), HEAD_DIM, ours, torch.float32)
        # The last bit, of values up to 1.4: float64 leaves nothing else to differ.
        torch.testing.assert_close(tuple(x.cpu() for x in found), expected, rtol=0, atol=2e-7)
