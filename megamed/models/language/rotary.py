"""RoPE: the frequencies, with the ways to stretch them to longer documents, and the rotation of queries and keys.

Shapes: T tokens, X heads of queries or of keys, D head width, F = D / 2 frequencies.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NoReturn

import torch
from torch import Tensor

from megamed.utils import UserError

Scaling = Literal["none", "linear", "ntk", "yarn", "llama3"]

# Which of the fields below a scaling reads, besides `base`. Another one that is set is a mistake.
_FIELDS: dict[Scaling, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": (
        "factor", "original_max_positions", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"
    ),
    "llama3": ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip


@dataclass
class RotaryConfig:
    """RoPE (Su et al., arXiv:2104.09864), and how it is stretched to documents longer than those of pretraining.

    Raises:
        UserError: a value out of its range, one that the scaling needs and that is missing, or one that it
            does not read.
    """

    base: float = 1e6
    """Frequencies fall from 1 to nearly 1 / base, in radians per position (`rope_theta` in transformers)."""
    scaling: Scaling = "none"
    """linear: every frequency divided by `factor` (position interpolation, Chen et al., arXiv:2306.15595). ntk: a
    larger base, base * factor^(D / (D - 2)), which leaves the highest frequency as it is and divides the lowest
    by `factor`. yarn: between the two, by how often a frequency turns within the original length, and an
    attention factor (Peng et al., arXiv:2309.00071). llama3: as in Llama 3.1 and later."""
    factor: float = 1.0
    """How many times longer documents become; above 1 with every scaling but none. With ntk it is not the `factor`
    of a `dynamic` scaling in transformers: docs/rope.md has the relation."""
    original_max_positions: int | None = None
    """Longest document of the pretraining, in tokens; yarn and llama3 need it."""
    beta_fast: float = 32.0
    """yarn: frequencies that turn more often than this within the original length stay as they are."""
    beta_slow: float = 1.0
    """yarn: frequencies that turn less often than this within the original length are divided by `factor`."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim` instead of `attention_factor`, which is then
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: float | None = None
    """yarn: see `mscale`."""
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; None means 0.1 ln(factor) + 1, as in the paper."""
    low_freq_factor: float = 1.0
    """llama3: frequencies that turn less often than this within the original length are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: frequencies that turn more often than this within the original length stay as they are."""

    def __post_init__(self) -> None:
        for field in fields(self):
            readers = [name for name, keys in _FIELDS.items() if field.name in keys]
            if readers and self.scaling not in readers and getattr(self, field.name) != field.default:
                self._refuse(
                    field.name,
                    f"is not read by scaling={self.scaling}; leave it out, or set scaling to {' or '.join(readers)}",
                )
        extended, original = self.scaling != "none", self.original_max_positions
        known = original is not None and original > 0
        rules = (
            ("base", self.base > 1, "above 1"),
            ("factor", not extended or self.factor > 1, f"above 1 with scaling={self.scaling}"),
            ("original_max_positions", known or self.scaling not in ("yarn", "llama3"),
             f"the longest document of the pretraining, in tokens, with scaling={self.scaling}"),
            ("beta_slow", 0 < self.beta_slow < self.beta_fast, f"above 0 and below beta_fast={self.beta_fast:g}"),
            ("low_freq_factor", 0 < self.low_freq_factor < self.high_freq_factor,
             f"above 0 and below high_freq_factor={self.high_freq_factor:g}"),
            ("attention_factor", self.attention_factor is None or self.attention_factor > 0, "above 0"),
            ("mscale", self.mscale is None or self.mscale > 0, "above 0"),
            ("mscale_all_dim", self.mscale_all_dim is None or self.mscale_all_dim > 0, "above 0"),
            ("mscale_all_dim", (self.mscale is None) == (self.mscale_all_dim is None), "given together with mscale"),
            ("attention_factor", self.attention_factor is None or self.mscale is None,
             "left out where mscale and mscale_all_dim are given"),
        )  # fmt: skip
        for key, holds, wanted in rules:
            if not holds:
                self._refuse(key, f"has to be {wanted}")

    def _refuse(self, key: str, reason: str) -> NoReturn:
        value = getattr(self, key)
        shown = "null" if value is None else f"{value:g}"
        raise UserError(f"model.language.rotary.{key}={shown} {reason}", everywhere=True)


def inverse_frequencies(config: RotaryConfig, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """Angle of each pair of a head's entries per position, in radians, the highest first.

    In float64: after a million positions, a frequency that was rounded to float32 is off by up to 0.03 rad.

    Args:
        config: base and scaling.
        head_dim: D, even and above 2.
        device: where the result lies.

    Returns:
        Frequencies [F], and what cosines and sines are multiplied by (1 but for yarn).
    """
    index_F = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    base = config.base * config.factor ** (head_dim / (head_dim - 2)) if config.scaling == "ntk" else config.base
    frequency_F = base ** (-2 / head_dim * index_F)
    if config.scaling == "linear":
        return frequency_F / config.factor, 1.0
    if config.scaling in ("none", "ntk"):
        return frequency_F, 1.0

    # What is left: high frequencies stay, low ones are divided by the factor, those between are a mixture.
    assert config.original_max_positions is not None
    if config.scaling == "llama3":
        turns_F = config.original_max_positions * frequency_F / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        attention_factor = 1.0
    else:
        first, last = _yarn_range(config, head_dim)
        kept_F = 1 - ((index_F - first) / max(last - first, 1)).clamp(0, 1)
        attention_factor = _yarn_attention_factor(config)
    return frequency_F * (kept_F + (1 - kept_F) / config.factor), attention_factor


def _yarn_range(config: RotaryConfig, head_dim: int) -> tuple[int, int]:
    """The last frequency that YaRN keeps and the first that it divides: whole numbers, as in transformers."""
    original = config.original_max_positions
    assert original is not None

    def index(turns: float) -> float:
        """Which frequency turns this often within the original length."""
        return head_dim / 2 * math.log(original / (2 * math.pi * turns)) / math.log(config.base)

    return max(math.floor(index(config.beta_fast)), 0), min(math.ceil(index(config.beta_slow)), head_dim - 1)


def _yarn_attention_factor(config: RotaryConfig) -> float:
    def factor(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale is not None and config.mscale_all_dim is not None:
        return factor(config.mscale) / factor(config.mscale_all_dim)
    return factor(1)


def rotary_table(position_T: Tensor, head_dim: int, config: RotaryConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles: made once a microbatch, used by all its layers.

    Angles are float64: at a million positions, where the visual tokens of long scans lead, float32 has steps of
    0.06 rad.

    Args:
        position_T: each token's position in its document, integers in any order.
        head_dim: D, even and above 2.
        config: base and scaling.
        dtype: of what is to be rotated, hence of the result.

    Returns:
        Two tensors [T, 1, D] for `rotate`: the halves of the cosines are equal, those of the sines opposite.
    """
    frequency_F, attention_factor = inverse_frequencies(config, head_dim, position_T.device)
    angle_T1F = torch.outer(position_T.double(), frequency_F)[:, None]
    cos_T1F = angle_T1F.cos().mul_(attention_factor).to(dtype)
    sin_T1F = angle_T1F.sin_().mul_(attention_factor).to(dtype)
    return torch.cat((cos_T1F, cos_T1F), -1), torch.cat((-sin_T1F, sin_T1F), -1)


def rotate(x_TXD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D / 2]) by its position's angle; arguments from `rotary_table`."""
    return torch.addcmul(x_TXD * cos_T1D, x_TXD.roll(x_TXD.shape[-1] // 2, -1), sin_T1D)
