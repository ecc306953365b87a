"""A whole job at one layout: its fullest rank, and its step."""

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

from megamed.preflight.cluster import ClusterConfig
from megamed.preflight.estimate import estimate_rank
from megamed.preflight.roofline import Estimate, estimate, rows_of_replica
from megamed.preflight.step import Rank, filled_row, trace_rank
from megamed.train import JobConfig
from megamed.utils.log import setup


@dataclass(frozen=True)
class Assessment:
    """What preflight finds.

    Attributes:
        config, cluster: what was asked.
        ranks: the first rank of the first pipeline stage, which has the most microbatches in flight, and that of the
            last, which has the output layer; by global rank.
        estimate: the step.
    """

    config: JobConfig
    cluster: ClusterConfig
    ranks: dict[int, Rank]
    estimate: Estimate

    @property
    def fullest(self) -> tuple[int, Rank]:
        """The rank that takes most memory."""
        return max(self.ranks.items(), key=lambda item: item[1].memory)

    @property
    def fits(self) -> bool:
        """Whether it has room."""
        return self.fullest[1].memory <= room(self.cluster)

    @property
    def name(self) -> str:
        """The layout, as overrides."""
        p = self.config.parallel
        sizes = {
            "tensor": p.tensor, "pipeline": p.pipeline, "virtual_pipeline": p.virtual_pipeline, "context": p.context,
            "expert": p.expert, "expert_tensor": p.expert_tensor,
        }  # fmt: skip
        told = [f"parallel.{key}={size}" for key, size in sizes.items()]
        return " ".join([*told, f"parallel.sequence={str(p.sequence).lower()}"])


def quieten() -> None:
    """Of what torch and Megatron warn about, nothing concerns a job that does not run."""
    setup(0, level="WARNING")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def room(cluster: ClusterConfig) -> float:
    """Bytes of a GPU that a job can have."""
    return (cluster.memory_gib - cluster.reserved_gib) * 2**30


def as_on(config: JobConfig, cluster: ClusterConfig) -> JobConfig:
    """A job as its ranks will see it: where the split of the context ranks is not set, it depends on the nodes."""
    ring, ulysses = config.attention.split(config.model.language, config.parallel, cluster.gpus_per_node)
    return replace(config, attention=replace(config.attention, ring=ring, ulysses=ulysses))


def assess(
    config: JobConfig,
    cluster: ClusterConfig,
    every_layer: bool = False,
    quick: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Assessment:
    """Build the ranks of a job, and run a step of each.

    Args:
        config: the job, validated for the cluster's GPUs.
        cluster: the GPUs.
        every_layer: trace all layers; by default, all are worked out from a few.
        quick: look at the first rank alone, and less closely: within some percent.
        progress: is given the ranks, and gives them back.

    Raises:
        UserError: the layout does not go with the job.
    """
    gpus = cluster.gpus
    config = as_on(config, cluster)
    row = filled_row(config)
    rows = [row] * rows_of_replica(config, gpus)
    num_stages = config.parallel.pipeline
    ends = [0] if quick else sorted({0, (num_stages - 1) * (gpus // num_stages)})
    trace = trace_rank if every_layer else partial(estimate_rank, few=1) if quick else estimate_rank
    ranks = {rank: trace(config, rank, gpus, rows) for rank in progress(ends)}
    return Assessment(config, cluster, ranks, estimate(config, list(ranks.values()), row, cluster))
