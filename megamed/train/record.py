"""What a run's folder keeps so that the run can be made again, and of each of its starts."""

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamed.utils import UserError
from megamed.utils.files import write_text

STARTS, RERUN, SOURCE, DATA, DIFF = "starts.jsonl", "rerun.sh", "source.json", "data.json", "uncommitted.diff"
ROOT = Path(__file__).resolve().parents[2]
# Variables that tell one start from another.
_OF_THE_START = {
    "restart": "TORCHELASTIC_RESTART_COUNT", "slurm_job": "SLURM_JOB_ID", "slurm_restart": "SLURM_RESTART_COUNT",
    "nodes": "GROUP_WORLD_SIZE",
}  # fmt: skip


def record_start(folder: Path, step: int, layout: dict[str, Any], data: dict[str, Any]) -> None:
    """Note a start in the run's folder; rank 0 alone.

    Args:
        folder: of the run, with its config.yaml.
        step: that it goes on after.
        layout: sizes of the parallel layout.
        data: what the data source says of its data.

    Raises:
        UserError: the folder cannot be written.
    """
    if dist.get_rank():
        return
    source, difference = source_state(ROOT)
    start = {"step": step, "time": round(time.time(), 1), "world_size": dist.get_world_size(), "layout": layout}
    start |= {key: int(os.environ[name]) for key, name in _OF_THE_START.items() if os.environ.get(name, "").isdigit()}
    text = json.dumps(data, sort_keys=True)
    known = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "state": data}
    try:
        with open(folder / STARTS, "a") as file:
            file.write(json.dumps(start) + "\n")
        write_text(folder / SOURCE, json.dumps(source, indent=1) + "\n")
        write_text(folder / DATA, json.dumps(known, indent=1) + "\n")
        if difference:
            write_text(folder / DIFF, difference)
        write_text(folder / RERUN, rerun_script(source, dist.get_world_size(), os.environ))
        (folder / RERUN).chmod(0o755)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); free space there or set run.dir to another disk"
        ) from error


def source_state(root: Path) -> tuple[dict[str, Any], str]:
    """The commit that the program is of, and what differs from it.

    Args:
        root: the folder of the program.

    Returns:
        `commit` (None without git), `is_changed`; and the difference as a patch.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "is_changed": None}, ""
    difference = _git(root, "diff", "HEAD", "--", "megamed", "conf", "launch") or ""
    others = _git(root, "ls-files", "--others", "--exclude-standard", "--", "megamed", "conf", "launch") or ""
    return {"commit": commit.strip(), "is_changed": bool(difference or others.strip())}, difference


def _git(root: Path, *arguments: str) -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=30)
        if done.returncode == 0:
            return done.stdout.decode()
    return None


def rerun_script(source: dict[str, Any], world_size: int, environment: Mapping[str, str]) -> str:
    """A shell script that makes a run again, from the configuration beside the script.

    Args:
        source: as from `source_state`.
        world_size: of the run.
        environment: variables of the process; torchrun's are looked at.
    """
    per_node = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    nodes, launcher = world_size // per_node, "python"
    if nodes > 1:
        launcher = f"torchrun --nnodes {nodes} --nproc-per-node {per_node} --rdzv-backend c10d --rdzv-endpoint $HEAD"
    elif world_size > 1:
        launcher = f"torchrun --nproc-per-node {per_node}"
    lines = ["#!/usr/bin/env bash", "# Makes this run again, in a folder beside it. Run it in megamed's folder."]
    if nodes > 1:
        lines.append("# On each node, with HEAD=HOST:PORT of the first one.")
    if source["commit"]:
        changed = f", with {DIFF} applied" if source["is_changed"] else ""
        lines.append(f"# The program was at commit {source['commit']}{changed}.")
    # By the place of the script, not by a path, which may hold a name.
    lines += ["set -eu", 'config="$(cd "$(dirname "$0")" && pwd)/config.yaml"']
    return "\n".join([*lines, f'exec {launcher} launch/pretrain.py --config "$config" run.resume=no "$@"', ""])
