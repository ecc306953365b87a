"""How long a step takes: counted work over what GPUs and links reach of their data sheets.

A model, not a measurement: matrix products and attention at a share of the peak, or at the speed of memory where that
is slower; all other operations at the speed of memory, one after the other; transfers at the speed of their link. The
ring's transfers hide behind its attention, nothing else hides. What a program on the host needs to start kernels, and
waiting for data, are not in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megamed.data import Microbatch
from megamed.models.flops import flops_of_language, projector_flops, vision_flops
from megamed.preflight.cluster import ClusterConfig
from megamed.preflight.step import GRADIENTS, LANGUAGE, OPTIMIZER, PHASES, VISION_BACKWARD, VISION_FORWARD, Rank
from megamed.preflight.work import ATTENTION, PRODUCTS, Amount, Sent, Work
from megamed.train import JobConfig

BUBBLE, ENCODER, SYNCHRONISATION = "pipeline bubble", "frame encoder", "gradients and weights"
# What computing and sending of a phase are called; by default, computing by its kinds, and sending by its axis.
_COMPUTING = {VISION_FORWARD: ENCODER, VISION_BACKWARD: ENCODER, GRADIENTS: "optimizer", OPTIMIZER: "optimizer"}
_SENDING = {GRADIENTS: SYNCHRONISATION, OPTIMIZER: SYNCHRONISATION}


@dataclass(frozen=True)
class Estimate:
    """Of a step.

    Attributes:
        seconds: by what they go to.
        model_flops: of the global batch, as MFU counts them.
        num_tokens: of the global batch.
        bubble: share of the language phase in which a pipeline stage has nothing to do.
        cluster: the GPUs.
    """

    seconds: dict[str, float]
    model_flops: float
    num_tokens: int
    bubble: float
    cluster: ClusterConfig

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the GPUs could do in that time."""
        return self.model_flops / (self.total * self.cluster.gpus * self.cluster.peak_tflops * 1e12)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.num_tokens / self.total

    @property
    def limit(self) -> str:
        """What most of the time goes to."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def compute_seconds(kind: str, amount: Amount, cluster: ClusterConfig) -> float:
    """Seconds of all operations of a kind.

    Args:
        kind: of operation.
        amount: of work.
        cluster: the GPUs.
    """
    reached = {PRODUCTS: cluster.products, ATTENTION: cluster.attention}.get(kind, 1.0)
    memory = amount.moved / (cluster.memory_gb_s * 1e9 * cluster.bandwidth)
    return max(amount.flops / (cluster.peak_tflops * 1e12 * reached), memory)


def transfer_seconds(operation: str, sent: Sent, ranks: list[int], cluster: ClusterConfig) -> float:
    """Seconds of all transfers of a kind over one axis.

    Args:
        operation: which.
        sent: how often, and how much.
        ranks: of the group.
        cluster: the GPUs.
    """
    hops = {"send": 1, "broadcast": 1, "reduce": 2 * (len(ranks) - 1)}.get(operation, len(ranks) - 1)
    return sent.sent / (cluster.link_gb_s(operation, ranks) * 1e9) + sent.calls * hops * cluster.latency_us * 1e-6


def phase_seconds(phase: str, work: Work, groups: Mapping[str, list[int]], cluster: ClusterConfig) -> dict[str, float]:
    """Seconds of a phase on one rank, by what they go to; the ring's are those that attention does not hide.

    Args:
        phase: which.
        work: of it.
        groups: ranks of the group of each axis.
        cluster: the GPUs.
    """
    seconds: dict[str, float] = {}
    for kind, amount in work.computed.items():
        _add(seconds, _COMPUTING.get(phase, kind), compute_seconds(kind, amount, cluster))
    for (axis, operation), sent in work.transfers.items():
        _add(seconds, _SENDING.get(phase, axis), transfer_seconds(operation, sent, groups[axis], cluster))
    if "ring" in seconds:
        size = len(groups["ring"])  # while the last of its blocks is computed, nothing is on its way
        seconds["ring"] = max(0.0, seconds["ring"] - seconds.get(ATTENTION, 0.0) * (size - 1) / size)
    return seconds


def estimate(config: JobConfig, ranks: Sequence[Rank], row: Microbatch, cluster: ClusterConfig) -> Estimate:
    """The step of a job.

    All ranks wait for the slowest at the end of each phase. The stages of a pipeline wait for each other: of the time
    that the slowest one works, a share of (p - 1) / (v m) again, for p stages of v chunks and m microbatches
    (Narayanan et al., 2021, arXiv:2104.04473).

    Args:
        config: the job.
        ranks: one of each stage, or of the first and the last.
        row: each of the rows.
        cluster: the GPUs.
    """
    found: dict[str, float] = {}
    share = (config.parallel.pipeline - 1) / (config.parallel.virtual_pipeline * rows_of_replica(config, cluster.gpus))
    for phase in PHASES:
        slowest = max(
            (phase_seconds(phase, rank.work[phase], rank.groups, cluster) for rank in ranks),
            key=lambda seconds: sum(seconds.values()),
        )
        for name, seconds in slowest.items():
            _add(found, name, seconds)
        if phase == LANGUAGE:
            _add(found, BUBBLE, share * sum(slowest.values()))
    num_tokens = config.train.microbatches * config.data.seq_length
    return Estimate(found, model_flops(config, row), num_tokens, share / (1 + share), cluster)


def rows_of_replica(config: JobConfig, world_size: int) -> int:
    """Microbatches of a step on each replica."""
    return config.train.microbatches // config.parallel.data_size(world_size)


def model_flops(config: JobConfig, row: Microbatch) -> float:
    """Of a global batch, as MFU counts them.

    Args:
        config: the job.
        row: each of its rows, of one document.
    """
    model, vision, num_frames = config.model, config.model.vision, len(row.frames)
    frames = vision_flops(vision, num_frames) + projector_flops(
        model.projector, num_frames, vision.image_size, vision.patch_size
    )
    num_labels = int(row.loss_kind_S.count_nonzero())
    of_row = frames + flops_of_language(model.language, [len(row.tokens_S)], num_labels)
    return config.train.microbatches * of_row.total


def _add(found: dict[str, float], name: str, seconds: float) -> None:
    found[name] = found.get(name, 0.0) + seconds
