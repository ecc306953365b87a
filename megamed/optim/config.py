"""Settings of the optimizer and the learning-rate schedule."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimConfig:
    """AdamW with Megatron's distributed optimizer, and a schedule of warm-up and decay."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    warmup_steps: int = 10
    router_warmup_steps: int = 0
    """First steps in which routers of experts alone are trained: for models that were merged from several."""
    decay_steps: int | None = None
    """Steps until `min_lr`; None takes the whole run."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest norm of the gradient over all parameters of the model; 0 does not clip."""
    distributed: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
