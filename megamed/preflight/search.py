"""Which layout is the best for a job: all that it accepts are assessed, and ranked."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import replace
from itertools import product, repeat
from multiprocessing import get_context, parent_process

from megamed.preflight.cluster import ClusterConfig
from megamed.preflight.job import Assessment, assess, quieten, room
from megamed.runtime import ParallelConfig
from megamed.train import JobConfig
from megamed.utils import UserError


def layouts(config: JobConfig, cluster: ClusterConfig) -> list[list[ParallelConfig]]:
    """Layouts that a job accepts: tensor parallelism within a node, and all of the rest.

    Args:
        config: the job.
        cluster: the GPUs.

    Returns:
        Those that hold the same weights together, the fewest context ranks first.
    """
    moe, gpus = config.model.language.moe, cluster.gpus
    groups = []
    tensors = [n for n in _divisors(gpus) if n <= cluster.gpus_per_node and cluster.gpus_per_node % n == 0]
    for tensor, pipeline in product(tensors, _divisors(gpus)):
        shared = sorted({1, tensor}) if moe.total_experts else [1]
        for virtual, expert, expert_tensor in product((1, 2), _divisors(max(moe.total_experts, 1)), shared):
            group = [
                replace(
                    config.parallel, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=context,
                    expert=expert, expert_tensor=expert_tensor, data=None, sequence=tensor > 1,
                )
                for context in _divisors(gpus)
            ]  # fmt: skip
            groups.append([parallel for parallel in group if _is_valid(config, parallel, gpus)])
    return [group for group in groups if group]


def with_layout(config: JobConfig, parallel: ParallelConfig) -> JobConfig:
    """A job, laid out in another way. The split of the context ranks is chosen anew."""
    changed = deepcopy(config)
    changed.parallel = parallel
    changed.attention.ring = changed.attention.ulysses = None
    return changed


def search(
    config: JobConfig,
    cluster: ClusterConfig,
    top: int,
    processes: int | None = None,
    done: Callable[[int], object] = lambda number: None,
) -> list[Assessment]:
    """Assess all layouts quickly and the best of them in full, in processes of their own.

    More context ranks hold the same weights and gradients, so where those alone do not fit, none are tried; nor are any
    after a layout that fits and is slower than one with fewer of them that fits.

    Args:
        config: the job.
        cluster: the GPUs.
        top: layouts to assess in full.
        processes: how many; None for one a core, eight at most, each of which takes a gigabyte.
        done: told how many layouts were dealt with, as it goes on: all, and `top` once more.

    Returns:
        Those, as `ranked`; fewer where the job accepts fewer.
    """
    groups = layouts(config, cluster)
    # Spawned, since torch's threads do not live through a fork.
    count = processes or min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=quieten) as pool:
        tasks: dict[Future[list[Assessment]], int] = {}
        for group in groups:
            tasks[pool.submit(_assess_group, config, cluster, group)] = len(group)
        found: list[Assessment] = []
        for task in as_completed(tasks):
            found += task.result()
            done(tasks[task])
        best = [x.config.parallel for x in ranked(found)[:top]]
        in_full = []
        for result in pool.map(_assess_layout, repeat(config), repeat(cluster), best):
            in_full.append(result)
            done(1)
        return ranked(in_full)


def ranked(found: Sequence[Assessment]) -> list[Assessment]:
    """Those that fit, the fastest first; then the others, the smallest first."""
    return sorted(found, key=lambda x: (0, x.estimate.total) if x.fits else (1, float(x.fullest[1].memory)))


def _assess_group(config: JobConfig, cluster: ClusterConfig, group: Sequence[ParallelConfig]) -> list[Assessment]:
    found: list[Assessment] = []
    for parallel in group:
        parent = parent_process()
        if parent is not None and not parent.is_alive():
            break  # nobody waits for this
        try:
            found.append(_assess_layout(config, cluster, parallel, quick=True))
        except UserError:
            continue  # the split of the sequence does not go with this row
        held = [rank.held for rank in found[-1].ranks.values()]
        if max(x.weights + x.gradients for x in held) > room(cluster):
            break
        fitting = [x.estimate.total for x in found if x.fits]
        if found[-1].fits and fitting[-1] > min(fitting):
            break
    return found


def _assess_layout(
    config: JobConfig, cluster: ClusterConfig, parallel: ParallelConfig, quick: bool = False
) -> Assessment:
    return assess(with_layout(config, parallel), cluster, quick=quick)


def _is_valid(config: JobConfig, parallel: ParallelConfig, gpus: int) -> bool:
    try:
        with_layout(config, parallel).validate(gpus)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
