"""Builds a training job on the mesh: model, optimizer, scheduler, steps."""

from dataclasses import dataclass

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megamed.optim import build_optimizer, build_scheduler
from megamed.parallel import PlacedModel, VisionPhase, place
from megamed.runtime import Mesh
from megamed.train.config import JobConfig
from megamed.train.step import Stepper


@dataclass(frozen=True)
class Job:
    """This rank's side of a training job."""

    config: JobConfig
    mesh: Mesh
    dtype: torch.dtype
    model: PlacedModel
    phase: VisionPhase
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    stepper: Stepper


def build_phase(config: JobConfig, model: PlacedModel, mesh: Mesh) -> VisionPhase:
    """The vision phase over the encoder of a placed model.

    Args:
        config: the settings.
        model: of this rank.
        mesh: the layout.
    """
    return VisionPhase(
        model.vision,
        mesh,
        tokens_per_frame=model.vision.module.tokens_per_frame,
        hidden_size=config.model.language.hidden_size,
        dtype=config.train.torch_dtype,
        frames_per_pass=config.model.frames_per_pass,
        frames_in_flight=config.model.frames_in_flight,
    )


def build_job(config: JobConfig, mesh: Mesh) -> Job:
    """Build everything that a job trains with. Collective.

    Args:
        config: the settings, validated.
        mesh: the layout.
    """
    dtype = config.train.torch_dtype
    model = place(config.model, config.attention, mesh, dtype, config.train.seed, config.optim.distributed)
    phase = build_phase(config, model, mesh)
    parts = [(model.language, mesh.language), ([model.vision], mesh.vision)]
    optimizer = build_optimizer(config.optim, parts, dtype)
    return Job(
        config=config,
        mesh=mesh,
        dtype=dtype,
        model=model,
        phase=phase,
        optimizer=optimizer,
        scheduler=build_scheduler(config.optim, optimizer, config.train.steps),
        stepper=Stepper(model, phase, mesh, config.train.text_loss_weight),
    )
