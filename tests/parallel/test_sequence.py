"""Which rank holds which tokens of a packed row."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megamed.parallel.sequence import row_order, sequence_shards
from megamed.runtime import ParallelConfig

BOUNDS = [0, 37, 38, 41, 80]


def mesh(ring: int, ulysses: int = 1, document_multiple: int = 1, **parallel: Any) -> Any:
    config = ParallelConfig(context=ring * ulysses, **parallel)
    size = config.tensor * config.pipeline * config.context
    return SimpleNamespace(
        config=config,
        ring=SimpleNamespace(size=lambda: ring),
        replica=SimpleNamespace(size=lambda: size),
        document_multiple=document_multiple,
    )


def row() -> Any:
    return SimpleNamespace(cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32))


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (8, 1), (4, 2)])
def test_every_token_is_on_one_context_rank_and_every_rank_holds_as_many(ring: int, ulysses: int) -> None:
    order = row_order(row(), mesh(ring, ulysses))
    parts = [order.of_context_rank(rank, ring * ulysses) for rank in range(ring * ulysses)]
    assert {len(part) for part in parts} == {BOUNDS[-1] // (ring * ulysses)}
    assert sorted(np.concatenate(parts)) == list(range(BOUNDS[-1]))
    assert np.array_equal(order.order_S[order.place_S], np.arange(BOUNDS[-1]))


def test_a_long_document_costs_every_ring_rank_the_same() -> None:
    bounds = torch.tensor([0, 4096], dtype=torch.int32)
    order = row_order(SimpleNamespace(cu_seqlens=bounds), mesh(8))  # type: ignore[arg-type]
    seen = [order.of_context_rank(rank, 8).sum() for rank in range(8)]  # each token sees those before it
    assert len(set(seen)) == 1


def test_attention_of_other_libraries_has_its_zigzag_over_all_context_ranks() -> None:
    bounds = torch.tensor([0, 16, 24], dtype=torch.int32)
    order = row_order(SimpleNamespace(cu_seqlens=bounds), mesh(2, 2, document_multiple=8))  # type: ignore[arg-type]
    # Document by document: the rank's chunk of 8, and the one as far from the end.
    assert order.of_context_rank(0, 4).tolist() == [0, 1, 14, 15, 16, 23]
    assert order.of_context_rank(2, 4).tolist() == [4, 5, 10, 11, 18, 21]
    with pytest.raises(ValueError, match="no multiples of 8"):
        row_order(row(), mesh(2, 2, document_multiple=8))


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, [(0, 40, True), (40, 80, True)]),
        ({"tensor": 2}, [(0, 40, True), (0, 40, False), (40, 80, True), (40, 80, False)]),
        ({"tensor": 2, "sequence": True}, [(0, 20, True), (20, 40, True), (40, 60, True), (60, 80, True)]),
        ({"pipeline": 2}, [(0, 40, True), (40, 80, True), (0, 0, False), (0, 0, False)]),
    ],
)
def test_shards_of_the_embeddings(parallel: dict[str, Any], expected: list[tuple[int, int, bool]]) -> None:
    shards = sequence_shards(mesh(2, **parallel), BOUNDS[-1])
    assert [(s.start, s.end, s.sends_gradient) for s in shards] == expected
