"""GPUs and links that a job is meant for, from `conf/cluster/`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from megamed.config import load
from megamed.config.load import did_you_mean
from megamed.utils import UserError


@dataclass
class ClusterConfig:
    """Facts of data sheets, and, below `reserved_gib`, assumptions about what is reached of them."""

    gpu: str = ""
    """Its name, for people."""
    gpus: int = 8
    """Of the whole job: the world size."""
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    """Of one GPU."""
    peak_tflops: float = 989.0
    """10^12 FLOPs a second, bf16, dense."""
    memory_gb_s: float = 3350.0
    """10^9 bytes a second between a GPU and its memory."""
    nvlink_gb_s: float = 450.0
    """10^9 bytes a second that a GPU sends within its node."""
    network_gb_s: float = 50.0
    """10^9 bytes a second that a GPU sends to other nodes, all at once."""

    reserved_gib: float = 6.0
    """Of the memory, what the CUDA context, NCCL, cuBLAS and fragmentation take."""
    products: float = 0.6
    """Share of the peak that matrix products reach."""
    attention: float = 0.5
    """Share of the peak that attention reaches."""
    bandwidth: float = 0.8
    """Share of a bandwidth that memory and links reach."""
    latency_us: float = 5.0
    """10^-6 seconds until a message is with the next rank, whatever its length."""

    def link_gb_s(self, operation: str, ranks: Sequence[int]) -> float:
        """10^9 bytes a second at which a rank sends in a group.

        A collective's ring leaves a node by one GPU's port and comes back by another's; where several GPUs of a node
        are in the group, NCCL has as many rings, and each GPU sends over its own. To a certain rank it is one port.

        Args:
            operation: as in `Work.transfers`.
            ranks: of the group.
        """
        num_nodes = self._num_nodes(ranks)
        if num_nodes == 1:
            return self.nvlink_gb_s * self.bandwidth
        ports = 1.0
        if operation == "all-to-all":
            # All but what stays in the node goes over the GPU's own port.
            ports = (len(ranks) - 1) / (len(ranks) - len(ranks) / num_nodes)
        elif operation != "send":
            ports = len(ranks) / num_nodes
        return min(self.nvlink_gb_s, ports * self.network_gb_s) * self.bandwidth

    def link_name(self, ranks: Sequence[int]) -> str:
        """Over what a group sends."""
        return "network" if self._num_nodes(ranks) > 1 else "NVLink"

    def _num_nodes(self, ranks: Sequence[int]) -> int:
        return len({rank // self.gpus_per_node for rank in ranks})


def load_cluster(conf: Path, name: str) -> ClusterConfig:
    """A file of `conf/cluster/`; NAMExN is N GPUs of what NAME.yaml describes.

    Raises:
        UserError: there is none of that name, or a key or value in it is wrong.
    """
    folder = conf / "cluster"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    counted = re.fullmatch(r"(.+)x([1-9]\d*)", name)
    base = counted[1] if counted and name not in names else name
    path = folder / f"{base}.yaml"
    if base not in names:
        hint = did_you_mean(base, names) or f"there are {', '.join(names)}"
        raise UserError(f"cluster={name}: there is no {path.name} in {folder}; {hint}")
    cluster = load(ClusterConfig, yaml.safe_load(path.read_text()), "cluster")
    for field in fields(cluster):
        value = getattr(cluster, field.name)
        if field.name not in ("gpu", "reserved_gib", "latency_us") and value <= 0:
            raise UserError(f"{path}: {field.name} is {value}, and has to be above 0")
    return replace(cluster, gpus=int(counted[2])) if counted and base != name else cluster
