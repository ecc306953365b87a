"""Settings of checkpoints."""

from dataclasses import dataclass


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, how many are kept, and how a run resumes."""

    every_steps: int = 100
    """Save after every so many steps; 0 saves at the end alone."""
    keep_last: int = 2
    """Complete checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Beside the last ones, keep those whose step is a multiple of this; 0 keeps none of them."""
    verify: bool = True
    """Compare all files with their checksums before a run goes on from a checkpoint; each rank reads its share."""
    asynchronous: bool = True
    """Write in a thread beside the training; the next save waits for it."""
    export_hf: bool = False
    """After the last step, make a Hugging Face folder of the last checkpoint: `hf_export/step_NNNNNNNN` of the run."""
    export_hf_each: bool = False
    """The same of each checkpoint, as soon as it is complete; training waits for it."""
