"""How context ranks are split into ring and Ulysses, as set and as picked."""

from typing import Any

import pytest
import torch

from megamed.models.language import AttentionConfig, LanguageConfig, check_backend
from megamed.ops.kernels import KERNELS
from megamed.runtime import ParallelConfig
from megamed.utils import UserError


def split(attention: dict[str, Any], heads: tuple[int, int], ranks_per_node: int = 8, **parallel: int) -> Any:
    language = LanguageConfig(num_heads=heads[0], num_kv_heads=heads[1])
    return AttentionConfig(**attention).split(language, ParallelConfig(**parallel), ranks_per_node)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ({"ring": 4, "ulysses": 2}, (4, 2)),
        ({"ring": 4}, (4, 2)),
        ({"ulysses": 4}, (2, 4)),
        ({"ring": 8, "ulysses": 1}, (8, 1)),
    ],
)
def test_what_is_set_is_taken(attention: dict[str, Any], expected: tuple[int, int]) -> None:
    assert split(attention, (48, 8), context=8) == expected


@pytest.mark.parametrize(
    ("heads", "ranks_per_node", "parallel", "expected"),
    [
        ((48, 8), 8, {"context": 8}, (1, 8)),  # all heads can be shared out
        ((48, 8), 8, {"context": 8, "tensor": 4}, (4, 2)),  # a node has room for 2 beside tensor 4
        ((48, 8), 64, {"context": 8, "tensor": 4}, (4, 2)),  # and 2 KV heads are all there are
        ((28, 4), 8, {"context": 8}, (2, 4)),
        ((32, 8), 8, {"context": 6}, (3, 2)),
        ((48, 8), 8, {}, (1, 1)),
    ],
)
def test_picked_are_as_many_ulysses_ranks_as_kv_heads_and_a_node_allow(
    heads: tuple[int, int], ranks_per_node: int, parallel: dict[str, int], expected: tuple[int, int]
) -> None:
    assert split({}, heads, ranks_per_node, **parallel) == expected


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ({"ring": 3}, "attention.ring=3 does not divide parallel.context=8"),
        ({"ulysses": 16}, "attention.ulysses=16 does not divide parallel.context=8"),
        ({"ring": 0}, "attention.ring=0 does not divide"),
        ({"ring": 2, "ulysses": 2}, "attention.ring=2 x attention.ulysses=2 = 4, but parallel.context=8"),
        ({"ulysses": 8}, "attention.ulysses=8 does not fit 12 query heads"),
    ],
)
def test_what_does_not_fit_is_said(attention: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        split(attention, (12, 4), context=8)


def test_every_kernel_can_be_chosen_by_name() -> None:
    choices = AttentionConfig.__dataclass_fields__["kernel"].type.__args__  # type: ignore[union-attr]
    assert set(choices) == {"auto", *KERNELS}


def test_a_kernel_that_cannot_run_here_is_said() -> None:
    wide = AttentionConfig(kernel="flash_attn" if torch.cuda.is_available() else "cudnn")
    with pytest.raises(UserError, match=f"attention.kernel={wide.kernel}"):
        check_backend(wide, LanguageConfig(head_dim=1024), ParallelConfig(), torch.bfloat16)
    check_backend(AttentionConfig(kernel="math"), LanguageConfig(), ParallelConfig(), torch.float32)
