"""The mesh of ranks: which process group reduces, gathers or exchanges what.

`Mesh` is the only door to `megatron.core.parallel_state`; everything else gets groups from it.
Rank order is Megatron's default, tensor fastest: tensor, context, (expert,) data, pipeline.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megamed.runtime.config import ParallelConfig

Group = dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Process groups of this rank, and its place on each axis."""

    config: ParallelConfig
    data_size: int
    language: ProcessGroupCollection
    """Megatron's groups, for the language model."""
    vision: ProcessGroupCollection
    """The same fields for the frame encoder: all ranks are data-parallel, every other axis is 1."""
    replica: Group
    """All ranks of one model replica (tensor x context x pipeline): a microbatch's frames are dealt over it."""
    ring: Group
    """The context ranks with this rank's place in `ulysses`: blocks of keys and values go round over them."""
    ulysses: Group
    """Neighbours among the context ranks that trade sequence for heads. ring x ulysses = context."""
    document_multiple: int = 1
    """Lengths of packed documents are multiples of it. 1 is for attention that takes any length and rows dealt out over
    the ring; above, documents are dealt out in equal chunks over all context ranks."""

    @property
    def data_rank(self) -> int:
        """Index of this rank's model replica."""
        return self.language.dp.rank()

    @property
    def context_rank(self) -> int:
        """Index of this rank among those that share its sequence: ring rank x ulysses + ulysses rank."""
        return self.language.cp.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embeddings."""
        return self.language.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.language.pp.rank() == self.language.pp.size() - 1


def replica_ranks(tensor: int, context: int, pipeline: int, data: int, replica: int) -> list[int]:
    """Global ranks of model replica `replica`, pipeline slowest, tensor fastest."""
    per_stage = tensor * context
    return [
        stage * per_stage * data + replica * per_stage + inner
        for stage in range(pipeline)
        for inner in range(per_stage)
    ]


def build_mesh(config: ParallelConfig, ulysses: int = 1, document_multiple: int = 1) -> Mesh:
    """Create every process group of the job. Collective: all ranks call it, with the same config.

    Args:
        config: the layout; checked against the world size.
        ulysses: context ranks that trade heads, a divisor of `config.context`; the ring has the rest.
        document_multiple: what the attention needs of the lengths of documents; see `Mesh`.

    Raises:
        UserError: the sizes do not fit the world size.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    data = config.data_size(world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor,
        create_gloo_process_groups=False,
    )
    replica = _my_group(
        [replica_ranks(config.tensor, config.context, config.pipeline, data, i) for i in range(data)], rank
    )
    alone = dist.new_group([rank], use_local_synchronization=True)  # no collective of all ranks for each
    language = ProcessGroupCollection.use_mpu_process_groups()
    context = dist.get_process_group_ranks(language.cp)
    me = context.index(rank)
    first = me - me % ulysses
    return Mesh(
        config=config,
        data_size=data,
        language=language,
        vision=_vision_groups(alone),
        replica=replica,
        ring=_part_of(language.cp, context[me % ulysses :: ulysses], alone),
        ulysses=_part_of(language.cp, context[first : first + ulysses], alone),
        document_multiple=document_multiple,
    )


def destroy_mesh() -> None:
    """Forget Megatron's groups, so that another mesh can be built in this process."""
    parallel_state.destroy_model_parallel()


def _my_group(all_ranks: list[list[int]], rank: int) -> Group:
    """Create one group for each list of ranks and return the one that has this rank."""
    mine: Any = None
    for ranks in all_ranks:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine


def _part_of(whole: Group, ranks: list[int], alone: Group) -> Group:
    """The group of `ranks`, which are this rank and others of `whole`; only they take part in making it."""
    if len(ranks) == 1:
        return alone
    if len(ranks) == whole.size():
        return whole
    return dist.new_group(ranks, use_local_synchronization=True)


def _vision_groups(alone: Group) -> ProcessGroupCollection:
    world = dist.group.WORLD
    return ProcessGroupCollection(
        tp=alone,
        pp=alone,
        cp=alone,
        ep=alone,
        mp=alone,  # gradients are whole on every rank once reduced: the norm needs no further sum
        tp_ep_pp=alone,
        expt_dp=alone,
        intra_expt_dp=alone,
        embd=None,
        pos_embd=None,
        dp=world,
        dp_cp=world,
        intra_dp_cp=world,
        intra_dist_opt=world,
    )
