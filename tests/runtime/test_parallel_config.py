"""The arithmetic of a layout, and what it says where it does not work out."""

import pytest

from megamed.runtime import ParallelConfig
from megamed.runtime.mesh import replica_ranks
from megamed.utils import UserError


def test_data_size_is_what_the_other_sizes_leave() -> None:
    assert ParallelConfig().data_size(6) == 6
    assert ParallelConfig(tensor=4, pipeline=2).data_size(64) == 8
    assert ParallelConfig(tensor=2, data=3).data_size(6) == 3


@pytest.mark.parametrize(
    ("config", "world_size", "message"),
    [
        (
            ParallelConfig(tensor=4, pipeline=2),
            12,
            "tensor 4 x pipeline 2 x context 1 = 8 does not divide the world size 12; start a multiple of 8 ranks",
        ),
        (
            ParallelConfig(tensor=2, data=3),
            8,
            "tensor 2 x pipeline 1 x context 1 x data 3 = 6, but the world size is 8; start 6 ranks or set "
            "parallel.data=4",
        ),
        (ParallelConfig(tensor=0), 1, "parallel.tensor=0 must be 1 or more"),
        (
            ParallelConfig(expert=4),
            2,
            "expert 4 x expert_tensor 1 = 4 does not divide tensor 1 x context 1 x data 2 = 2",
        ),
        (ParallelConfig(virtual_pipeline=2), 1, "parallel.virtual_pipeline=2 needs parallel.pipeline above 1"),
        (ParallelConfig(expert=2, tensor=2), 2, "parallel.expert with parallel.tensor needs parallel.sequence=true"),
    ],
)
def test_wrong_sizes_say_the_arithmetic(config: ParallelConfig, world_size: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        config.data_size(world_size)
    assert message in str(error.value)
    assert error.value.everywhere


def test_replicas_cover_every_rank_once_in_megatrons_order() -> None:
    # 16 ranks: tensor 2, pipeline 2, data 4. Tensor is fastest and pipeline slowest.
    replicas = [replica_ranks(tensor=2, context=1, pipeline=2, data=4, replica=i) for i in range(4)]
    assert replicas[0] == [0, 1, 8, 9]
    assert replicas[3] == [6, 7, 14, 15]
    assert sorted(rank for ranks in replicas for rank in ranks) == list(range(16))
