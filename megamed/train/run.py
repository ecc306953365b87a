"""The folder of a run, and whether it goes on from a checkpoint."""

import json
import select
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist

from megamed import __version__
from megamed.checkpoint import list_checkpoints, read_card
from megamed.config import to_yaml
from megamed.runtime import Mesh
from megamed.train.config import JobConfig, RunConfig
from megamed.utils import UserError

_ANSWER_SECONDS = 300


def choose_run(config: RunConfig) -> tuple[Path, Path | None]:
    """The folder of this run and the checkpoint to go on from, the same on every rank. Collective.

    Rank 0 decides, and asks at a terminal. A run that starts anew beside an older one of its name gets
    a number, so that nothing is overwritten.

    Raises:
        UserError: the folder cannot be made.
    """
    choice: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [_choose(config)]
        except OSError as error:
            choice = [UserError(f"{Path(config.dir) / config.name}: cannot be made ({error}); set run.dir", everywhere=True)]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], UserError):
        raise choice[0]
    return choice[0]


def _choose(config: RunConfig) -> tuple[Path, Path | None]:
    folder = Path(config.dir) / config.name
    found = list_checkpoints(folder / "checkpoints")
    if found and (config.resume == "yes" or (config.resume == "ask" and _wants_to_go_on(found[-1]))):
        print(f"going on from {found[-1]} (run.resume=no starts anew)", flush=True)
        return folder, found[-1]
    number = 2
    while (folder / "config.yaml").exists() and (found or config.resume == "no"):
        folder = Path(config.dir) / f"{config.name}-{number}"
        found = list_checkpoints(folder / "checkpoints")
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder, None


def _wants_to_go_on(checkpoint: Path) -> bool:
    step = read_card(checkpoint)["step"]
    if not (sys.stdin and sys.stdin.isatty()):
        return True
    print(f"{checkpoint} is from step {step}. Go on from it? [Y/n] ", end="", flush=True)
    ready, _, _ = select.select([sys.stdin], [], [], _ANSWER_SECONDS)
    if not ready:
        print(f"\nno answer in {_ANSWER_SECONDS} s", flush=True)
        return True
    return sys.stdin.readline().strip().lower() not in ("n", "no")


def describe(config: JobConfig, mesh: Mesh) -> dict[str, Any]:
    """What a checkpoint's card says of the run: model, layout, versions. No path, no name."""
    layout = asdict(config.parallel)
    layout["data"] = mesh.data_size
    return {
        "format": 1,
        "model": _flat(asdict(config.model)),
        "layout": layout,
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


def write_config(config: JobConfig, folder: Path) -> None:
    """Keep the composed configuration in the run's folder; rank 0 alone."""
    if dist.get_rank() == 0:
        try:
            (folder / "config.yaml").write_text(to_yaml(config))
            (folder / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        except OSError as error:
            free = shutil.disk_usage(folder).free
            raise UserError(f"{folder}: cannot be written ({error}; {free} bytes free); set run.dir") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted keys, without those that do not change what the weights mean."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif key not in ("recompute", "frames_per_pass", "dispatcher", "aux_loss_coeff", "z_loss_coeff", "name"):
            flat[f"{prefix}{key}"] = value
    return flat


def check_vocabulary(config: JobConfig, vocab_size: int) -> None:
    """Check that the model has a row for every token.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """
    if vocab_size > config.model.language.vocab_size:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {vocab_size} tokens, the model "
            f"{config.model.language.vocab_size}; set model.language.vocab_size={vocab_size}",
            everywhere=True,
        )


def say_where(folder: Path) -> None:
    """Print where everything of a run is."""
    kept = list_checkpoints(folder / "checkpoints")
    print(f"\nmetrics      {folder / 'metrics.jsonl'}")
    print(f"config       {folder / 'config.yaml'}")
    if kept:
        print(f"checkpoint   {kept[-1]} ({len(kept)} kept)")
