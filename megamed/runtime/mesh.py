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

    @property
    def data_rank(self) -> int:
        """Index of this rank's model replica."""
        return self.language.dp.rank()

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


def build_mesh(config: ParallelConfig) -> Mesh:
    """Create every process group of the job. Collective: all ranks call it, with the same config.

    Args:
        config: the layout; checked against the world size.

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
    return Mesh(
        config=config,
        data_size=data,
        language=ProcessGroupCollection.use_mpu_process_groups(),
        vision=_vision_groups(alone),
        replica=replica,
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
