"""Builds Megatron's optimizer and scheduler over the language model and the frame encoder together."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.process_groups_config import ProcessGroupCollection

from megamed.optim.config import OptimConfig
from megamed.runtime import device_type


def build_optimizer(
    config: OptimConfig,
    parts: Sequence[tuple[list[DistributedDataParallel], ProcessGroupCollection]],
    dtype: torch.dtype,
) -> ChainedOptimizer:
    """One optimizer over several parts of a model, each with its own data-parallel group.

    One gradient norm is taken over all parts, and all are clipped by it.

    Args:
        config: the settings.
        parts: wrapped model chunks of each part, with its process groups.
        dtype: type of the parameters; below fp32, the optimizer keeps fp32 copies.
    """
    mcore = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
    )
    # A group of their own, so that they can be trained alone.
    overrides = {
        **get_standard_config_overrides(mcore),
        ParamKey(attr="is_router"): ParamGroupOverride(is_router=True),  # type: ignore[typeddict-unknown-key]
    }
    optimizers = []
    for chunks, groups in parts:
        built = get_megatron_optimizer(
            mcore, chunks, overrides, use_gloo_process_groups=False, pg_collection=groups
        )
        optimizers += built.chained_optimizers
    if device_type() == "cpu":
        # Megatron leaves torch's AdamW at its default, which on a CPU goes from parameter to parameter in Python.
        for group in (group for part in optimizers for group in part.param_groups):
            group["fused"] = True
    return ChainedOptimizer(optimizers)


class Scheduler(OptimizerParamScheduler):
    """Megatron's scheduler; in the first steps all but the experts' routers has a learning rate of 0.

    Args:
        router_warmup_steps: how many steps.
        arguments: those of `OptimizerParamScheduler`.
    """

    def __init__(self, router_warmup_steps: int, *arguments: Any, **named: Any):
        self.router_warmup_steps = router_warmup_steps  # the constructor below asks for a learning rate
        super().__init__(*arguments, **named)

    def get_lr(self, param_group: dict) -> float:
        """Learning rate of a group of parameters at the next step."""
        if self.num_steps < self.router_warmup_steps and not param_group.get("is_router"):
            return 0.0
        return super().get_lr(param_group)


def build_scheduler(config: OptimConfig, optimizer: ChainedOptimizer, total_steps: int) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay; one increment is one optimizer step.

    Args:
        config: the settings.
        optimizer: whose parameter groups are scheduled.
        total_steps: length of the run, in optimizer steps.
    """
    return Scheduler(
        config.router_warmup_steps,
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=min(config.warmup_steps, max(total_steps - 1, 0)),
        lr_decay_steps=config.decay_steps or total_steps,
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def clip_by_total_norm(optimizer: ChainedOptimizer, total_norm: float) -> None:
    """Scale all gradients so that their common norm is at most `clip_grad`; nothing where that is 0.

    Args:
        optimizer: after `prepare_grads`.
        total_norm: norm over all parameters of all parts.
    """
    for part in optimizer.chained_optimizers:
        parameters = part.get_parameters()
        if part.config.clip_grad > 0.0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=total_norm)
