"""What a checkpoint holds, as Megatron's sharded state dict: any layout can read what another wrote."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megamed.runtime import Mesh, rng_state

# The optimizer's state in the shape of the parameters, so that tensor, pipeline, expert and data sizes may change.
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def model_state(language: Sequence[DistributedDataParallel], vision: DistributedDataParallel, mesh: Mesh) -> dict:
    """Sharded state of all weights of this rank."""
    state: dict[str, Any] = {}
    for index, chunk in enumerate(language):
        state[f"language{index}"] = chunk.module.sharded_state_dict(prefix="language.")
    tensors = vision.module.state_dict(prefix="vision.", keep_vars=True)
    state["vision"] = make_sharded_tensors_for_checkpoint(
        tensors, "", tp_group=mesh.vision.tp, dp_cp_group=mesh.vision.dp_cp
    )
    return state


def optimizer_state(optimizer: ChainedOptimizer, model: dict, is_loading: bool) -> dict:
    """Sharded state of the optimizer, without its parameter groups.

    Which groups a rank has depends on the layout, and all they hold is set by the scheduler or is the
    number of steps taken, which is saved beside them. So they stay what they are on this rank.
    """
    fill_state(optimizer)
    state = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(OPTIMIZER_FORMAT))
    parts = [state] if len(optimizer.chained_optimizers) == 1 else list(state.values())
    for part in parts:
        inner = part.get("optimizer", part)
        inner["param_groups"] = LocalNonpersistentObject(inner["param_groups"])
    return state


def fill_state(optimizer: ChainedOptimizer) -> None:
    """Give every parameter its (zero) Adam state, as the first step would.

    Megatron reads the number of steps from the first parameter's state, before as after the first step.
    """
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
                if isinstance(part.optimizer, torch.optim.Optimizer) and "step" not in state and "step" not in group:
                    state["step"] = torch.tensor(0.0)


def set_num_steps(optimizer: ChainedOptimizer, state: dict, num_steps: int) -> None:
    """Put the number of steps taken into loaded optimizer state, where Adam's bias correction reads it."""
    parts = [state] if len(optimizer.chained_optimizers) == 1 else list(state.values())
    for part, chained in zip(parts, optimizer.chained_optimizers, strict=True):
        inner = part.get("optimizer", part)
        for group in inner["param_groups"]:
            if "step" in group or isinstance(chained, DistributedOptimizer):
                group["step"] = num_steps


def random_state() -> ShardedObject:
    """Every rank's random-number states; read back at the same number of ranks only."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return ShardedObject("random", rng_state(), (size,), (rank,), replica_id=0)
