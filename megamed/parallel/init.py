"""Initial weights that do not depend on the layout.

Megatron draws each shard from a per-rank stream, so that every layout starts from another model. Here
a parameter's values are drawn whole, from a generator seeded by the job's seed and the parameter's
name in the checkpoint, and each rank keeps its part. The same seed then means the same model on one
process and on a thousand. It costs each rank the drawing of its layers' whole matrices.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

# Megatron scales these, the layers that write to the residual stream, by the depth of the model.
_RESIDUAL_WRITERS = ("self_attention.linear_proj.weight", "linear_fc2.weight")


def sharded_tensors(state: object) -> Iterator[ShardedTensor]:
    """All sharded tensors of a nested sharded state dict; factories are built, their data are views."""
    if isinstance(state, ShardedTensorFactory):
        yield from sharded_tensors(state.build())
    elif isinstance(state, ShardedTensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from sharded_tensors(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from sharded_tensors(value)


def global_name(tensor: ShardedTensor) -> str:
    """The name of one whole parameter: the checkpoint key and its index in stacked layers or experts."""
    stack = ",".join(str(i) for i in tensor.global_offset[: tensor.prepend_axis_num])
    return f"{tensor.key}[{stack}]" if stack else tensor.key


def global_region(tensor: ShardedTensor) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """Shape of the whole parameter, and the region of it that this shard is."""
    stacked = tensor.prepend_axis_num
    shape = tuple(tensor.global_shape[stacked:])
    region = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True))
    return shape, region


@torch.no_grad()
def init_language(chunks: Iterable[nn.Module], seed: int, std: float, num_layers: int) -> None:
    """Draw the language model's weights, in place.

    Matrices are normal with standard deviation `std`, those that write to the residual stream with
    std / sqrt(2 * num_layers) as in Megatron-LM; norms are 1 and biases 0.

    Args:
        chunks: this rank's model chunks.
        seed: the job's seed.
        std: standard deviation.
        num_layers: depth of the whole model.
    """
    for chunk in chunks:
        for tensor in sharded_tensors(chunk.sharded_state_dict()):  # type: ignore[operator]
            _draw(tensor, seed, std, num_layers)


def _draw(tensor: ShardedTensor, seed: int, std: float, num_layers: int) -> None:
    shape, region = global_region(tensor)
    if tensor.key.endswith("router.prior"):
        return  # set by the router, which knows its pools
    if len(shape) < 2:
        tensor.data.fill_(0.0 if tensor.key.endswith("bias") else 1.0)
        return
    if tensor.key.endswith(_RESIDUAL_WRITERS):
        std = std / math.sqrt(2 * num_layers)
    tensor.data.copy_(drawn(global_name(tensor), shape, seed, std)[region])


def drawn(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    """A whole parameter's initial values, fp32, on the host.

    Args:
        name: from `global_name`.
        shape: of the parameter.
        seed: the job's seed.
        std: standard deviation.
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").mul_(std)
