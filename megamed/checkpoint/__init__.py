"""Checkpoints of a training run, readable at any layout."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.checkpoint.card import describe_model, find_checkpoint, list_checkpoints, model_of, read_card, step_of
from megamed.checkpoint.config import CheckpointConfig
from megamed.checkpoint.manager import CheckpointManager

__all__ = [
    "CheckpointConfig",
    "CheckpointManager",
    "describe_model",
    "find_checkpoint",
    "list_checkpoints",
    "model_of",
    "read_card",
    "step_of",
]
