"""Memory that a rank holds from the first step to the last: weights, gradients, and the optimizer's state.

A rank is built as training builds it (`megamed.parallel.place`, Megatron's DDP and optimizer), with torch's fake
process group in the place of the others and on the meta device, so buffers have Megatron's padding and shards its
sizes. What is counted is storage, each once: with the distributed optimizer weights lie in a buffer, and in fp32 the
optimizer's copy of them is the weights themselves.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamed.optim import build_optimizer
from megamed.parallel import PlacedModel, place
from megamed.runtime import Mesh, build_mesh, destroy_mesh, meta_device, seed_everything
from megamed.train import JobConfig


@dataclass(frozen=True)
class Held:
    """Bytes of a rank.

    Attributes:
        weights: parameters, with the padding of the buffers that they lie in.
        gradients: sums in fp32, padded likewise.
        optimizer: fp32 copies of this rank's share of the weights, and Adam's two moments.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def held_by(model: PlacedModel, optimizer: ChainedOptimizer) -> Held:
    """What a rank's model and optimizer hold, whether or not they have memory.

    Args:
        model: placed.
        optimizer: of it; its state is allocated if it is not yet.
    """
    seen: set[int] = set()
    weights = _bytes(seen, _weights(model))
    gradients = _bytes(seen, _gradients(model))
    return Held(weights, gradients, _bytes(seen, _state(optimizer)))


@dataclass(frozen=True)
class BuiltRank:
    """A rank of a job, on the meta device."""

    mesh: Mesh
    model: PlacedModel
    optimizer: ChainedOptimizer


@contextmanager
def built_rank(config: JobConfig, rank: int, world_size: int) -> Iterator[BuiltRank]:
    """Build one rank of a job as training builds it; inside, everything is made on the meta device.

    This process must not be in a process group, and use no GPU.

    Args:
        config: the job, validated for this world size.
        rank: which.
        world_size: of the job.
    """
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        mesh = build_mesh(config.parallel, config.ulysses, config.document_multiple)
        seed_everything(0, mesh.data_rank)  # Megatron's layers want random states, which nothing draws from
        dtype = config.train.torch_dtype
        with meta_device():
            model = place(config.model, config.attention, mesh, dtype, None, config.optim.distributed)
            parts = [(model.language, mesh.language), ([model.vision], mesh.vision)]
            yield BuiltRank(mesh, model, build_optimizer(config.optim, parts, dtype))
    finally:
        destroy_mesh()
        dist.destroy_process_group()


def _weights(model: PlacedModel) -> Iterator[Tensor]:
    for part in model.parts:
        yield from part.parameters()


def _gradients(model: PlacedModel) -> Iterator[Tensor]:
    for part in model.parts:
        for buffer in [*part.buffers, *part.expert_parallel_buffers]:
            yield buffer.grad_data


def _state(optimizer: ChainedOptimizer) -> Iterator[Tensor]:
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not inner.state:
            part.init_state_fn(inner, part.config)
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            # Counts of steps are a number a parameter, and no memory of the device.
            yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())


def _bytes(seen: set[int], tensors: Iterable[Tensor]) -> int:
    """Of the storages that were not seen before."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            total += storage.nbytes()
    return total
