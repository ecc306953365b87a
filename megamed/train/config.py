"""The settings of a whole training job; `conf/` holds their values."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from megamed.checkpoint import CheckpointConfig
from megamed.data import DataConfig
from megamed.models.language import AttentionConfig, check_backend
from megamed.models.vlm import VLMConfig
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, default_dtype, ranks_per_node
from megamed.utils import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class FaultsConfig:
    """What becomes of steps whose gradient would do harm."""

    not_finite: Literal["stop", "skip", "rollback"] = "stop"
    """Loss or gradient norm is no number: end the run, leave the step out, or go back to the last checkpoint and on
    with the data that come after it."""
    spike: Literal["none", "stop", "skip", "rollback"] = "none"
    """The same where the gradient norm spikes; none lets the optimizer have it, clipped."""
    spike_factor: float = 10.0
    """A spike is a norm above this many times the median of the steps before."""
    window: int = 100
    """Steps of that median."""
    min_steps: int = 20
    """Steps that have to be known before anything is a spike."""
    most: int = 10
    """More bad steps than this within `window` steps end the run, whatever the policy."""


@dataclass
class TrainConfig:
    """Length and batch of the run."""

    steps: int = 100
    """Optimizer steps of the whole run."""
    microbatches: int = 4
    """Packed rows of the global batch, over all replicas."""
    seed: int = 1234
    """Decides the initial weights and every random draw."""
    text_loss_weight: float = 1.0
    """Weight of the loss on text beside the answers (questions, context), whose own weight is 1."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of weights and activations; auto is bf16 on a GPU and fp32 on a CPU."""
    straggler_steps: int = 50
    """Compare ranks after so many steps, and name those that are slow (docs/faults.md); 0 never does."""
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """Gradients that are not finite, and spikes."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type that `dtype` stands for on this machine."""
        return default_dtype() if self.dtype == "auto" else DTYPES[self.dtype]


@dataclass
class InitConfig:
    """Where a new run takes its initial weights from; a run that goes on has its own."""

    checkpoint: str | None = None
    """A checkpoint of any layout, or the folder of a run, whose newest is taken. The weights alone are: step,
    optimizer and data begin anew. None draws weights by `train.seed`."""
    hf: str | None = None
    """The folder of a Hugging Face model, whose weights are read as they are. Sizes of the model are those of its
    config.json, whatever `model` says, and the tokenizer is its own unless `data.tokenizer` names one."""


@dataclass
class RunConfig:
    """Where a run is kept and whether it goes on."""

    name: str = "run"
    dir: str = "runs"
    """Folder of all runs; this one is in `dir/name`."""
    preflight: Literal["auto", "yes", "no"] = "auto"
    """Before a new run allocates anything, see whether it will fit (docs/preflight.md): auto does on GPUs."""
    hang_minutes: float = 30.0
    """End a rank that takes longer than this from one step to the next, so that torchrun starts the job again; 0
    never does. What each of its threads did then is kept in the run's folder."""
    resume: Literal["ask", "yes", "no"] = "ask"
    """Go on from the last checkpoint of the same name: ask at a terminal (elsewhere: yes), always, or never."""


@dataclass
class WandbConfig:
    """Weights & Biases. Nothing is sent anywhere unless `mode=online`."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "megamed"


@dataclass
class EvalConfig:
    """Questions about held-out data."""

    held_out: bool = True
    """Ask at the end of the run."""
    every_steps: int = 0
    """Also ask after every so many steps; 0 does not."""
    max_new_tokens: int = 24
    blank_control: bool = True
    """Ask again with blank frames: what the model still gets right, it has from memory."""


@dataclass
class JobConfig:
    """Everything that decides a training job."""

    model: VLMConfig = field(default_factory=VLMConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: InitConfig = field(default_factory=InitConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    @property
    def ulysses(self) -> int:
        """Context ranks that trade heads, as set or picked; the ring has the others.

        Raises:
            UserError: what is set does not fit.
        """
        return self.attention.split(self.model.language, self.parallel, ranks_per_node())[1]

    @property
    def document_multiple(self) -> int:
        """What the length of every packed document has to be a multiple of; 1 for megamed's own attention."""
        return self.attention.document_multiple(self.parallel)

    def validate(self, world_size: int) -> None:
        """Check all that can be checked before any process group exists.

        Raises:
            UserError: names the key, the value and the mend.
        """
        data_size = self.parallel.data_size(world_size)
        self.model.validate()
        self.model.language.validate(self.parallel)
        self.attention.validate(self.model.language, self.parallel)
        check_backend(self.attention, self.model.language, self.parallel, self.train.torch_dtype)
        if self.train.microbatches % data_size:
            raise UserError(
                f"train.microbatches={self.train.microbatches} does not divide by the {data_size} model replicas",
                everywhere=True,
            )
        per_replica = self.train.microbatches // data_size
        if self.parallel.virtual_pipeline > 1 and per_replica % self.parallel.pipeline:
            raise UserError(
                f"parallel.virtual_pipeline={self.parallel.virtual_pipeline} needs the microbatches of a replica "
                f"({per_replica}) to divide by parallel.pipeline={self.parallel.pipeline}; change train.microbatches",
                everywhere=True,
            )
        parts = self.parallel.context * (self.parallel.tensor if self.parallel.sequence else 1)
        if self.data.seq_length % self.document_multiple:
            raise UserError(
                f"data.seq_length={self.data.seq_length} has to be a multiple of 2 x parallel.context = "
                f"{self.document_multiple} with attention.backend={self.attention.backend}",
                everywhere=True,
            )
        if self.data.seq_length % parts:
            tensor = f" x parallel.tensor={self.parallel.tensor}" if self.parallel.sequence else ""
            raise UserError(
                f"data.seq_length={self.data.seq_length} does not divide by "
                f"parallel.context={self.parallel.context}{tensor}; "
                f"{-(-self.data.seq_length // parts) * parts} does",
                everywhere=True,
            )
        if self.train.text_loss_weight < 0:
            raise UserError(
                f"train.text_loss_weight={self.train.text_loss_weight} must not be negative", everywhere=True
            )
        if self.train.steps < 1:
            raise UserError(f"train.steps={self.train.steps} must be 1 or more", everywhere=True)
