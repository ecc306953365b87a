"""Checkpoints of a training run, readable at any layout."""

import megamed.runtime  # noqa: F401  makes Megatron importable, before the modules below import it
from megamed.checkpoint.config import CheckpointConfig
from megamed.checkpoint.manager import CheckpointManager, list_checkpoints, read_card

__all__ = ["CheckpointConfig", "CheckpointManager", "list_checkpoints", "read_card"]
