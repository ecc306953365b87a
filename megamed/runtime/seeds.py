"""Random-number states: one seed for the job, Megatron's per-rank streams, save and restore."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from megamed.runtime.device import device_type


def seed_everything(seed: int, data_rank: int) -> None:
    """Seed Python, NumPy, PyTorch and Megatron's random-state tracker.

    Args:
        seed: the job's seed.
        data_rank: index of the model replica; replicas draw differently, ranks of one alike.
    """
    random.seed(seed + data_rank)
    np.random.seed(seed + data_rank)
    torch.manual_seed(seed + data_rank)
    tensor_parallel.model_parallel_cuda_manual_seed(seed + data_rank, force_reset_rng=True)


def rng_state() -> dict[str, Any]:
    """Every random-number state of this rank, for a checkpoint."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device_type() == "cuda" else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device_type() == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
