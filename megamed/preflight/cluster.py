"""GPUs that a job is meant for, from `conf/cluster/`."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from megamed.config import load
from megamed.config.load import did_you_mean
from megamed.utils import UserError


@dataclass
class ClusterConfig:
    """Facts of the data sheet of a GPU, and how many there are."""

    gpu: str = ""
    """Its name, for people."""
    gpus: int = 8
    """Of the whole job: the world size."""
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    """Of one GPU."""
    reserved_gib: float = 6.0
    """Of it, what the CUDA context, NCCL, cuBLAS and fragmentation take. Assumed."""


def load_cluster(conf: Path, name: str) -> ClusterConfig:
    """A file of `conf/cluster/`.

    Raises:
        UserError: there is none of that name, or a key or value in it is wrong.
    """
    folder = conf / "cluster"
    path = folder / f"{name}.yaml"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        hint = did_you_mean(name, names) or f"there are {', '.join(names)}"
        raise UserError(f"cluster={name}: there is no {path.name} in {folder}; {hint}")
    cluster = load(ClusterConfig, yaml.safe_load(path.read_text()), "cluster")
    for key in ("gpus", "gpus_per_node", "memory_gib"):
        if getattr(cluster, key) <= 0:
            raise UserError(f"{path}: {key} is {getattr(cluster, key)}, and has to be above 0")
    return cluster
