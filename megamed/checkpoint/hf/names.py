"""Parameters by the names that tables know them by: those of the module's state dict, layer and expert by number.

Checkpoints stack the layers of dense models and the experts of a layer along leading axes, and name the norm in front
of a linear layer after the linear layer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megamed.checkpoint.weights import Weights

_STACKED_LAYERS = re.compile(r"(.*\.layers\.)(?!\d+\.)(.*)")
_EXPERTS, _EXPERT = ".mlp.experts.experts.", ".mlp.experts.local_experts."
_NORMS = {
    ".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
    ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Stored:
    """A parameter in a checkpoint.

    Attributes:
        name: by which `Weights` reads it.
        stack: its place along the axis of experts, where there is one.
        shape: of the parameter alone.
    """

    name: str
    stack: tuple[int, ...]
    shape: tuple[int, ...]


def name_of(key: str, stack: tuple[int, ...]) -> str:
    """A parameter's name, of its key in a checkpoint and its place along the leading axes."""
    if found := _STACKED_LAYERS.fullmatch(key):
        key, stack = f"{found[1]}{stack[0]}.{found[2]}", stack[1:]
    for old, new in _NORMS.items():
        key = key.replace(old, new)
    return key.replace(_EXPERTS, f"{_EXPERT}{stack[0]}.") if stack else key


def stored(weights: Weights) -> Iterator[tuple[str, Stored]]:
    """All parameters of a checkpoint, by name."""
    for key in weights:
        shape = weights.shape(key)
        found = _STACKED_LAYERS.fullmatch(key)
        for layer in range(shape[0]) if found else (None,):
            numbered = f"{found[1]}{layer}.{found[2]}" if found else key
            rest = shape[1:] if found else shape
            if _EXPERTS in key:
                for expert in range(rest[0]):
                    yield name_of(numbered, (expert,)), Stored(numbered, (expert,), rest[1:])
            else:
                yield name_of(numbered, ()), Stored(numbered, (), rest)
