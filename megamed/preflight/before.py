"""What a training job asks itself before it allocates anything: whether it will fit."""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megamed.checkpoint import list_checkpoints
from megamed.runtime import device_type, global_rank, ranks_per_node, world_size
from megamed.train import JobConfig
from megamed.utils import UserError

log = logging.getLogger(__name__)

_TOOL = Path(__file__).resolve().parents[2] / "tools" / "preflight.py"


def check_before_start(config: JobConfig, file: Path | None, overrides: Sequence[str]) -> None:
    """Have `tools/preflight.py` look at a new run, in a process that sees no GPU. The first rank alone does.

    A run that goes on has shown that it fits. A preflight that fails in another way ends nothing.

    Args:
        config: the job.
        file, overrides: where the configuration is from: the file in the place of `conf/`, and the command line.

    Raises:
        UserError: the job does not fit; says what would.
    """
    wanted = config.run.preflight == "yes" or (config.run.preflight == "auto" and device_type() == "cuda")
    checkpoints = Path(config.run.dir) / config.run.name / "checkpoints"
    if not wanted or global_rank() or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if config.run.resume != "no" and list_checkpoints(checkpoints):
        return
    memory, gpus = _memory_gib(), world_size()
    command = [sys.executable, str(_TOOL), *overrides, *(["--config", str(file)] if file else [])]
    command += ["--gpus", str(gpus), "--gpus-per-node", str(ranks_per_node()), "--memory", f"{memory:.2f}"]
    log.info("preflight: whether %d ranks of %.0f GiB have room (run.preflight=no leaves it out)", gpus, memory)
    done = subprocess.run(command, env=alone_without_gpu(), capture_output=True, text=True)
    if done.returncode == 1 and (verdict := [line for line in done.stdout.splitlines() if "does not fit" in line]):
        raise UserError(f"preflight: {verdict[-1]} (run.preflight=no starts it anyhow)")
    if done.returncode:
        log.warning(
            "preflight ended with code %d and without a verdict: %s", done.returncode, done.stderr.strip()[-500:]
        )


def alone_without_gpu() -> dict[str, str]:
    """This rank's environment for a process that is no rank, and sees no GPU."""
    hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
    return {key: value for key, value in os.environ.items() if key not in hidden} | {"CUDA_VISIBLE_DEVICES": ""}


def _memory_gib() -> float:
    """Of this rank's device; without a GPU, its share of the machine's."""
    if device_type() == "cuda":
        return torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / ranks_per_node()
