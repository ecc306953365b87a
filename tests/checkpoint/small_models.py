"""Checkpoints of tiny models, and what a model computes with the weights in one. Functions of one rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megamed.checkpoint import CheckpointConfig, CheckpointManager
from megamed.models.moe import PoolConfig
from megamed.models.vlm import VLMConfig
from megamed.optim import OptimConfig
from megamed.parallel import run_schedule
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import Job, JobConfig, build_job
from megamed.train.run import describe

SEQ_LENGTH, WIDTH = 64, 96


def dense(**language: Any) -> VLMConfig:
    return tiny_vlm(num_layers=2, tie_embeddings=True, **language)


def specialists(sizes: dict[str, int], **moe: Any) -> VLMConfig:
    """A model with pools of experts as wide as the dense model's MLP, unless another width is given."""
    config = dense()
    pools = {name: PoolConfig(size) for name, size in sizes.items()}
    config.language.moe = replace(config.language.moe, **{"intermediate_size": WIDTH, "pools": pools, **moe})
    return config


def build(config: VLMConfig, folder: Path, layout: dict[str, Any], **train: Any) -> tuple[Job, CheckpointManager]:
    job_config = JobConfig()
    job_config.model, job_config.parallel = config, ParallelConfig(**layout)
    job_config.optim = OptimConfig(lr=1e-2, warmup_steps=0)
    job_config.data.seq_length = SEQ_LENGTH
    job_config.train = replace(job_config.train, **train)
    mesh = build_mesh(job_config.parallel, job_config.ulysses)
    seed_everything(1, mesh.data_rank)
    job = build_job(job_config, mesh)
    settings, saved = CheckpointConfig(asynchronous=False), (job.model, job.optimizer, job.scheduler)
    return job, CheckpointManager(folder, settings, *saved, mesh, describe(job_config, mesh))


def save(config: VLMConfig, run: str, seed: int, dtype: str = "fp32") -> None:
    """Save a model without a parameter that is 0 or 1, as initial biases and norms are."""
    job, manager = build(config, Path(run) / "checkpoints", {}, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in job.model.parts:
            for tensor in [*part.module.parameters(), *part.module.buffers()]:
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    manager.save(1, 4)


def logits(config: VLMConfig, checkpoint: str, called: tuple[int, ...], layout: dict[str, Any]) -> np.ndarray:
    """Logits of two microbatches of this rank [2, S, V], padding left out, whose documents all have these specialties.

    Args:
        config: the model.
        checkpoint: its weights, as `init.checkpoint` takes them.
        called: specialties by document, as numbers.
        layout: fields of `ParallelConfig`; every rank has all tokens and the whole vocabulary.
    """
    job, manager = build(config, Path(checkpoint) / "unused", layout, seed=77)
    manager.start_from(checkpoint)
    return logits_of(job, called)


def logits_of(job: Job, called: tuple[int, ...], source: SyntheticSource | None = None) -> np.ndarray:
    """The same of a model that is there; of another source's microbatches, if one is given."""
    source = source or SyntheticSource(SEQ_LENGTH, specialties=(called,))
    microbatches = [source.microbatch(i) for i in range(2)]
    for part in job.model.parts:
        part.eval()
    with torch.no_grad():
        rows = job.phase.forward(microbatches, source.load_frames, keep_graph=False)
        inputs = job.phase.language_inputs(microbatches, rows)
        found = run_schedule(
            job.model.language, inputs, lambda output, item: (output.new_zeros(()), output[0]), False, train=False
        )
    real = [m.padding_S.logical_not() for m in microbatches]
    vocabulary = job.config.model.language.vocab_size
    return np.concatenate([x_SV[keep, :vocabulary].numpy() for x_SV, keep in zip(found, real, strict=True)])


def train(config: VLMConfig, checkpoint: str, folder: str, num_steps: int, layout: dict[str, Any]) -> list[float]:
    """Losses of some steps from a checkpoint's weights."""
    job, manager = build(config, Path(folder), layout, seed=77, steps=num_steps)
    manager.start_from(checkpoint)
    source = SyntheticSource(SEQ_LENGTH, specialties=((1, 2, 0), (3,)))
    losses = []
    for _ in range(num_steps):
        microbatches = [source.microbatch(i) for i in range(job.mesh.data_rank, 4, job.mesh.data_size)]
        losses.append(job.stepper.train(microbatches, source.load_frames, job.optimizer).loss)
        job.scheduler.step(1)
    return losses
