"""Padding at the end of a row is cut off where no other rank counts on the row's length."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megamed.data import Document, pack
from megamed.parallel import trim_padding
from megamed.runtime import ParallelConfig


def row(*lengths: int, seq_length: int = 64) -> Any:
    return pack([Document("d", list(range(1, n + 1)), [1] * n) for n in lengths], seq_length, pad_id=0)


def mesh(**parallel: Any) -> Any:
    return SimpleNamespace(config=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("lengths", "kept", "bounds"),
    [
        ((10, 7), 32, [0, 10, 17, 32]),  # to the next multiple of 16, the rest of the padding its own document
        ((10, 6), 16, [0, 10, 16]),  # no padding left
        ((30, 31), 64, [0, 30, 61, 64]),
        ((), 16, [0, 16]),
    ],
)
def test_rows_end_behind_their_last_document(lengths: tuple[int, ...], kept: int, bounds: list[int]) -> None:
    whole = row(*lengths)
    (cut,) = trim_padding([whole], mesh())
    for name in ("tokens_S", "labels_S", "loss_kind_S", "position_S"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[:kept]), name
    assert cut.cu_seqlens.tolist() == bounds and cut.cu_seqlens.dtype == whole.cu_seqlens.dtype
    assert cut.num_real == whole.num_real and not whole.loss_kind_S[kept:].any()


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"expert": 2}])
def test_rows_that_other_ranks_count_on_stay_whole(parallel: dict[str, Any]) -> None:
    whole = row(10, 7)
    assert trim_padding([whole], mesh(**parallel)) == [whole]


@pytest.mark.parametrize(
    ("parallel", "kept"),
    [({"tensor": 2}, 32), ({"tensor": 2, "sequence": True}, 32), ({"context": 4}, 64), ({"context": 3}, 48)],
)
def test_rows_divide_over_the_ranks_that_share_them(parallel: dict[str, Any], kept: int) -> None:
    assert len(trim_padding([row(10, 7, seq_length=96)], mesh(**parallel))[0].tokens_S) == kept
