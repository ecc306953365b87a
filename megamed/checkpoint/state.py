"""What a checkpoint holds, as Megatron's sharded state dict: any layout can read what another wrote."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megamed.runtime import Mesh, rng_state

# The optimizer's state in the shape of the parameters, so that tensor, pipeline, expert and data sizes may change.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(language: Sequence[DistributedDataParallel], vision: DistributedDataParallel, mesh: Mesh) -> dict:
    """Sharded state of all weights of this rank."""
    return weights_state([chunk.module for chunk in language], vision.module, mesh)


def weights_state(language: Sequence[Any], vision: nn.Module, mesh: Mesh) -> dict:
    """The same, of modules that nothing wraps."""
    state: dict[str, Any] = {}
    for index, chunk in enumerate(language):
        state[f"language{index}"] = chunk.sharded_state_dict(prefix="language.")
    tensors = vision.state_dict(prefix="vision.", keep_vars=True)
    state["vision"] = make_sharded_tensors_for_checkpoint(
        tensors, "", tp_group=mesh.vision.tp, dp_cp_group=mesh.vision.dp_cp
    )
    return state


def optimizer_state(optimizer: ChainedOptimizer, model: dict, is_loading: bool) -> dict:
    """Sharded state of the optimizer: its tensors alone, by number of the chained optimizer.

    Parameter groups stay out. Which ones a rank has depends on the layout, and all they hold is set by
    the configuration and the scheduler, or is the number of steps taken, which is on the card.
    """
    _fill_state(optimizer)
    state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(OPTIMIZER_FORMAT))
    parts = {0: state} if len(optimizer.chained_optimizers) == 1 else state
    for part in parts.values():
        part.get("optimizer", part).pop("param_groups")
    return parts


@torch.no_grad()
def load_optimizer(optimizer: ChainedOptimizer, state: dict, num_steps: int) -> None:
    """Copy loaded state into the optimizer.

    Not through Megatron's `load_state_dict`: with torch's Adam it asks the checkpoint for each parameter's
    number of steps, and gives all parameters one tensor of it, which every parameter then counts up.

    Args:
        optimizer: its state is allocated, by `optimizer_state`.
        state: loaded, in the form of `optimizer_state`.
        num_steps: optimizer steps that were taken; Adam's bias correction reads it.
    """
    for number, part in enumerate(optimizer.chained_optimizers):
        loaded = state[number]
        states = part.optimizer.state
        for parameter_state in states.values():
            parameter_state.pop("step", None)
        if isinstance(part, DistributedOptimizer):
            part.load_parameter_state_from_fully_reshardable(loaded["param_state"])
        else:
            inner = loaded.get("optimizer", loaded)
            for index, parameter in enumerate(part.get_parameters()):
                for key, value in states[parameter].items():
                    value.copy_(inner["state"][index][key])
            for ours, theirs in zip(
                getattr(part, "fp32_from_float16_groups", []), loaded.get("fp32_from_fp16_params", []), strict=True
            ):
                for main, value in zip(ours, theirs, strict=True):
                    main.copy_(value)
        _set_num_steps(part.optimizer, num_steps)


def _fill_state(optimizer: ChainedOptimizer) -> None:
    """Allocate every parameter's Adam state, as the first step would; Megatron reads it before as after that."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if any("step" not in state for state in part.optimizer.state.values()):
            _set_num_steps(part.optimizer, 0)


def _set_num_steps(optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    """torch's Adam counts steps for each parameter, Transformer Engine's and Apex's for each group."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        for state in optimizer.state.values():
            state["step"] = torch.tensor(float(num_steps))
    else:
        for group in optimizer.param_groups:
            group["step"] = num_steps


def random_state() -> ShardedObject:
    """Every rank's random-number states; read back at the same number of ranks only."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return ShardedObject("random", rng_state(), (size,), (rank,), replica_id=0)
