"""Collects whole parameters and gradients from the shards of a parallel layout."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megamed.parallel import PlacedModel
from megamed.parallel.init import global_name, global_region, sharded_tensors

Shards = list[tuple[str, tuple[int, ...], tuple[slice, ...], np.ndarray]]


def shards(model: PlacedModel, gradients: bool) -> Shards:
    """This rank's shards: name of the whole tensor, its shape, the region, and the values (copied).

    Args:
        model: this rank's parts.
        gradients: take `main_grad` instead of the parameter.
    """
    found: Shards = []
    for part in model.parts:
        prefix = "vision." if part is model.vision else ""
        if gradients:
            _complete_gradients(part)
        saved = {p: p.data for p in part.parameters()}
        for parameter in saved:
            if gradients:
                parameter.data = parameter.main_grad.to(parameter.dtype)  # type: ignore[attr-defined]
        for name, shape, region, value in _views(part, bool(prefix)):
            found.append((prefix + name, shape, region, value.detach().float().cpu().numpy().copy()))
        for parameter, data in saved.items():
            parameter.data = data
    return found


def _views(part: DistributedDataParallel, is_vision: bool) -> Any:
    if is_vision:
        for name, parameter in part.module.named_parameters():
            yield name, tuple(parameter.shape), tuple(slice(0, n) for n in parameter.shape), parameter.data
    else:
        for tensor in sharded_tensors(part.module.sharded_state_dict()):
            shape, region = global_region(tensor)
            yield global_name(tensor), shape, region, tensor.data


def _complete_gradients(part: DistributedDataParallel) -> None:
    """With the distributed optimizer, a rank's reduced gradients are its own slice of each bucket: gather."""
    if not part.ddp_config.use_distributed_optimizer:
        return
    for buffer in [*part.buffers, *part.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            whole = bucket.grad_data
            piece = whole.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(whole, piece, group=group)


def merge(per_rank: list[Shards]) -> dict[str, np.ndarray]:
    """Whole tensors from all ranks' shards.

    Raises:
        AssertionError: two ranks that hold the same values differ, or part of a tensor is on no rank.
    """
    whole: dict[str, np.ndarray] = {}
    for rank_shards in per_rank:
        for name, shape, region, value in rank_shards:
            target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
            there = target[region]
            known = ~np.isnan(there)
            # Replicas reduce in different orders only, so they differ by rounding alone.
            np.testing.assert_allclose(
                there[known], value[known], rtol=1e-4, atol=1e-6 + 1e-5 * np.abs(value).max(), err_msg=name
            )
            target[region] = value
    for name, target in whole.items():
        assert not np.isnan(target).any(), f"{name}: part of it is on no rank"
    return whole


def to_tensor(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same, as tensors."""
    return {name: torch.from_numpy(value) for name, value in values.items()}
