"""Looks at nodes, network and storage before a job: a minute now, in the place of an hour of waiting for nothing.

    torchrun --nproc-per-node 8 tools/check_nodes.py --dir runs

Every rank meets the others, they sum a tensor together and say how fast, all are of one version, and each node reads
what the next one wrote to the folder of the runs. What is wrong is said in one line, with the node that it is about;
exit code 2 then. The scripts in slurm/ run it first.
"""

import argparse
import contextlib
import os
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

_SAID_BYTES, _FILE_BYTES = 2**26, 2**24


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    parser.add_argument("--minutes", type=float, default=2.0, help="to wait for other ranks (default: 2)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megamed import runtime
    from megamed.train.run import versions
    from megamed.utils import UserError

    runtime.start(timeout_minutes=args.minutes)
    rank, local_rank = dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    mine = (socket.gethostname(), versions(), torch.cuda.device_count() if torch.cuda.is_available() else 0)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    for other, (host, theirs, gpus) in enumerate(everybody):
        first_host, first, first_gpus = everybody[0]
        for key in first:
            if theirs[key] != first[key]:
                raise UserError(
                    f"{host} (rank {other}) has {key} {theirs[key]}, and {first_host} {first[key]}; install the same "
                    "on all nodes, or put the environment in a folder that all of them see", everywhere=True,
                )  # fmt: skip
        if bool(gpus) != bool(first_gpus):
            raise UserError(
                f"{host} (rank {other}) has {gpus} GPUs, and {first_host} {first_gpus}; leave it out with --exclude, "
                "and have its driver looked at", everywhere=True,
            )  # fmt: skip
    bandwidth = _sum_together()
    per_node = runtime.ranks_per_node()
    _check_storage(args.dir, rank // per_node, dist.get_world_size() // per_node, local_rank, mine[0])
    if rank == 0:
        print(f"megamed: {dist.get_world_size()} ranks on {dist.get_world_size() // per_node} nodes meet, sum at "
              f"{bandwidth / 1e9:.2f} GB/s, and see one folder of runs")  # fmt: skip


def _sum_together() -> float:
    """Bytes a second of a sum over all ranks, as NCCL's tests count them (2 (n - 1) / n times the size)."""
    import torch
    import torch.distributed as dist

    from megamed.runtime import current_device, synchronize

    tensor, size = torch.ones(_SAID_BYTES // 4, device=current_device()), dist.get_world_size()
    dist.all_reduce(tensor)  # connections are made in the first one
    synchronize()
    began = time.perf_counter()
    dist.all_reduce(tensor)
    synchronize()
    return 2 * (size - 1) / size * _SAID_BYTES / (time.perf_counter() - began)


def _check_storage(folder: Path, node: int, nodes: int, local_rank: int, host: str) -> None:
    """Each node writes a file, and reads the next one's."""
    import torch.distributed as dist

    from megamed.utils import UserError

    problem, mark = None, os.environ.get("TORCHELASTIC_RUN_ID", "check")
    paths = [folder / f".check-{mark}-{number}" for number in range(nodes)]
    content = bytes([node % 251]) * _FILE_BYTES
    try:
        if local_rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            with open(paths[node], "wb") as file:
                file.write(content)
                os.fsync(file.fileno())
    except OSError as error:
        problem = f"{host}: {folder} cannot be written ({error.strerror}); set run.dir to a folder that can"
    dist.barrier()
    following = (node + 1) % nodes
    written = bytes([following % 251]) * _FILE_BYTES
    try:
        if local_rank == 0 and problem is None and paths[following].read_bytes() != written:
            problem = f"{host}: what another node wrote to {folder} reads otherwise here; look at the file system"
    except OSError as error:
        problem = (
            f"{host}: does not see what another node wrote to {folder} ({error.strerror}); set run.dir to a folder on "
            "a file system that all nodes share"
        )
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if local_rank == 0:
        with contextlib.suppress(OSError):
            paths[node].unlink()
    if first := next(filter(None, problems), None):
        raise UserError(first, everywhere=True)


if __name__ == "__main__":
    arguments = parse()
    from megamed.runtime.process import run as run_process

    run_process(partial(main, arguments))
