"""The folder of a run, and whether it goes on from a checkpoint."""

import json
import logging
import os
import select
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

from megamed import __version__
from megamed.checkpoint import describe_model, list_checkpoints, step_of
from megamed.checkpoint.hf.start import model_of_folder
from megamed.config import to_yaml
from megamed.data import DataConfig, TextTokenizer
from megamed.data.tokenizer import has_tokenizer
from megamed.runtime import Mesh
from megamed.train.config import DTYPES, JobConfig, RunConfig
from megamed.train.record import record_start
from megamed.utils import UserError
from megamed.utils.optional import apex_notice

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 300
_VISION_SIZES = (
    "image_size", "patch_size", "num_channels", "hidden_size", "num_layers", "num_heads", "intermediate_size"
)
_LANGUAGE_SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "max_positions"
)


def check_values(config: JobConfig) -> None:
    """Check each value that no other value decides about.

    Raises:
        UserError: names the key, the value and the range.
    """
    optim, keep, name = config.optim, config.checkpoint, config.run.name
    faults = config.train.faults
    warmup_steps = min(optim.warmup_steps, config.train.steps - 1)
    positive = [
        *((f"model.vision.{key}", getattr(config.model.vision, key)) for key in _VISION_SIZES),
        *((f"model.language.{key}", getattr(config.model.language, key)) for key in _LANGUAGE_SIZES),
        ("model.frames_per_pass", config.model.frames_per_pass),
        *[("model.frames_in_flight", n) for n in [config.model.frames_in_flight] if n is not None],
        ("train.steps", config.train.steps),
        ("train.microbatches", config.train.microbatches),
        ("eval.max_new_tokens", config.eval.max_new_tokens),
    ]
    rules = (
        *((key, value, value >= 1, "1 or more") for key, value in positive),
        ("train.seed", config.train.seed, 0 <= config.train.seed < 2**31, "from 0 to 2147483647"),
        ("optim.lr", optim.lr, optim.lr > 0, "above 0"),
        ("optim.min_lr", optim.min_lr, 0 <= optim.min_lr <= optim.lr, f"from 0 to optim.lr = {optim.lr:g}"),
        ("optim.warmup_steps", optim.warmup_steps, optim.warmup_steps >= 0, "0 or more"),
        ("optim.decay_steps", optim.decay_steps, optim.decay_steps is None or optim.decay_steps > warmup_steps,
         f"above the {warmup_steps} steps of warm-up"),
        ("optim.weight_decay", optim.weight_decay, optim.weight_decay >= 0, "0 or more"),
        ("optim.beta1", optim.beta1, 0 <= optim.beta1 < 1, "from 0 to below 1"),
        ("optim.beta2", optim.beta2, 0 <= optim.beta2 < 1, "from 0 to below 1"),
        ("optim.eps", optim.eps, optim.eps > 0, "above 0"),
        ("optim.clip_grad", optim.clip_grad, optim.clip_grad >= 0, "0 or more"),
        ("train.faults.spike_factor", faults.spike_factor, faults.spike_factor > 1, "above 1"),
        ("train.faults.window", faults.window, faults.window >= 1, "1 or more"),
        ("train.faults.min_steps", faults.min_steps, 1 <= faults.min_steps <= faults.window,
         f"from 1 to train.faults.window = {faults.window}"),
        ("train.faults.most", faults.most, faults.most >= 1, "1 or more"),
        ("train.straggler_steps", config.train.straggler_steps, config.train.straggler_steps >= 0, "0 or more"),
        ("checkpoint.every_steps", keep.every_steps, keep.every_steps >= 0, "0 or more"),
        ("checkpoint.keep_last", keep.keep_last, keep.keep_last >= 0, "0 or more"),
        ("checkpoint.keep_every", keep.keep_every, keep.keep_every >= 0, "0 or more"),
        ("eval.every_steps", config.eval.every_steps, config.eval.every_steps >= 0, "0 or more"),
        ("run.hang_minutes", config.run.hang_minutes, config.run.hang_minutes >= 0, "0 or more"),
        ("run.dir", config.run.dir, bool(config.run.dir), "a folder"),
        ("run.name", name, Path(name).name == name and name not in ("", ".."), "the name of one folder"),
    )
    for key, value, holds, wanted in rules:
        if not holds:
            raise UserError(f"{key}={value!r} has to be {wanted}", everywhere=True)


def adopt_hf(config: JobConfig) -> None:
    """Take sizes and tokenizer of `init.hf`, in place.

    Raises:
        UserError: the folder is damaged or not understood, or another beginning is asked for, too.
    """
    if config.init.hf is None:
        return
    if config.init.checkpoint is not None:
        raise UserError("init.hf and init.checkpoint are both set; leave one of them out", everywhere=True)
    folder = Path(config.init.hf)
    config.model = model_of_folder(folder, config.model)
    if config.data.tokenizer == DataConfig.tokenizer and has_tokenizer(folder):
        config.data.tokenizer = str(folder)


def check_vocabulary(config: JobConfig, tokenizer: TextTokenizer) -> None:
    """Check that the model has a row for every token.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """
    num_rows = config.model.language.vocab_size
    if tokenizer.vocab_size > num_rows:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, the model {num_rows}; set "
            f"model.language.vocab_size={tokenizer.vocab_size}",
            everywhere=True,
        )


def choose_run(config: RunConfig) -> tuple[Path, Path | None]:
    """The folder of this run and the checkpoint to go on from, the same on every rank. Collective.

    Rank 0 decides, and asks at a terminal. A run that starts anew beside an older one of its name gets
    a number, so that nothing is overwritten.

    Raises:
        UserError: the folder cannot be made, or a checkpoint does not say what it is.
    """
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [_choose(config)]
        except UserError as error:
            choice = [error]
        except OSError as error:
            folder = Path(config.dir) / config.name
            choice = [UserError(f"{folder}: cannot be made ({error.strerror}); set run.dir to a folder that can")]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    return choice[0]


def _choose(config: RunConfig) -> tuple[Path, Path | None]:
    folder = Path(config.dir) / config.name
    found = list_checkpoints(folder / "checkpoints")
    if found and (config.resume == "yes" or (config.resume == "ask" and _wants_to_go_on(found[-1]))):
        log.info("going on from %s (run.resume=no starts anew)", found[-1])
        return folder, found[-1]
    number = 2
    while found or (config.resume == "no" and (folder / "config.yaml").exists()):
        folder = Path(config.dir) / f"{config.name}-{number}"
        found = list_checkpoints(folder / "checkpoints")
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    if number > 2:
        log.info("starting anew in %s (run.name=%s goes on with it later)", folder, folder.name)
    return folder, None


def _wants_to_go_on(checkpoint: Path) -> bool:
    step = step_of(checkpoint)
    if not _can_ask():
        return True
    print(f"{checkpoint} is from step {step}. Go on from it? [Y/n] ", end="", file=sys.stderr, flush=True)
    if not select.select([sys.stdin], [], [], _ANSWER_SECONDS)[0]:
        print(f"\nno answer in {_ANSWER_SECONDS} s", file=sys.stderr, flush=True)
        return True
    answer = sys.stdin.readline()
    if not answer:  # end of input leaves the cursor behind the question
        print(file=sys.stderr, flush=True)
    return not answer.strip().lower().startswith("n")


def _can_ask() -> bool:
    """Whether someone sees a question and can answer it: a terminal, and the job in its foreground.

    torchrun's workers have its terminal as their standard input, but are in sessions of their own, so that the
    system neither stops them in the background nor keeps them from taking what is typed there for the shell.
    """
    if not (sys.stdin and sys.stdin.isatty() and sys.stderr and sys.stderr.isatty()):
        return False
    started = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        fields = Path(f"/proc/{started}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux
        return True
    group, foreground_group = fields[2], fields[5]  # proc(5): pgrp, tpgid
    return group == foreground_group


def describe(config: JobConfig, mesh: Mesh) -> dict[str, Any]:
    """What a checkpoint's card says of the run: model, layout, optimizer, versions. No path, no name."""
    layout = asdict(config.parallel)
    layout["data"] = mesh.data_size
    dtype = next(name for name, dtype in DTYPES.items() if dtype == config.train.torch_dtype)
    return {
        "format": 1,
        "model": describe_model(config.model),
        "layout": layout,
        "optimizer": {"optim.distributed": config.optim.distributed, "train.dtype": dtype},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "megamed": __version__,
        "torch": str(torch.__version__),
        "megatron-core": megatron.core.__version__,
        "python": sys.version.split()[0],
    }


def write_settings(
    config: JobConfig,
    tokenizer: TextTokenizer,
    folder: Path,
    start_step: int,
    layout: dict[str, Any],
    data: dict[str, Any],
) -> None:
    """Keep what makes the run again in its folder: configuration, versions, tokenizer, program, data; rank 0 alone.

    A configuration that differs from the one of the steps before stays, under the number of the last of them.

    Args:
        config, tokenizer: of the run.
        folder: of the run.
        start_step: that this start goes on after.
        layout: sizes of the parallel layout.
        data: what the data source says of its data.

    Raises:
        UserError: the folder cannot be written.
    """
    if dist.get_rank():
        return
    path, text = folder / "config.yaml", to_yaml(config)
    earlier = folder / f"config.until_step_{start_step:08d}.yaml"
    try:
        if start_step and path.exists() and path.read_text() != text and not earlier.exists():
            path.replace(earlier)
        path.write_text(text)
        (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        tokenizer.save(folder / "tokenizer")
    except Exception as error:  # tokenizers raises plain Exception
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{folder}: cannot be written ({reason}); free space there or set run.dir to another disk"
        ) from error
    record_start(folder, start_step, layout, data)


def say_start() -> None:
    """Log what a user should know of the environment."""
    if notice := apex_notice():
        log.info(notice)


def say_complete(start_step: int, folder: Path) -> None:
    """Say that a run has all its steps, and how it gets more."""
    log.info(
        "%s is complete: it has taken %d steps; to train on, set train.steps to more of them, for instance "
        "train.steps=%d", folder, start_step, 2 * start_step,
    )


def say_where(folder: Path) -> None:
    """Print where everything of a run is; rank 0 alone."""
    if dist.get_rank():
        return
    kept = list_checkpoints(folder / "checkpoints")
    print(f"\nmetrics      {folder / 'metrics.jsonl'}")
    print(f"config       {folder / 'config.yaml'}")
    if kept:
        print(f"checkpoint   {kept[-1]} ({len(kept)} kept)")
