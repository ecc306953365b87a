"""The plan: who computes what, against the row's own causal mask."""

import numpy as np
import pytest
import torch
from whole_row import ROWS, bounds

from megamed.ops.ring_plan import Block, RingPlan, plan_ring
from megamed.ops.zigzag import shard_order
from megamed.utils import UserError

RINGS = (1, 2, 3, 4, 8)


def _tokens(tokens: object, shard_T: np.ndarray) -> np.ndarray:
    return tokens.take(torch.from_numpy(shard_T)).numpy()  # type: ignore[attr-defined]


def _mark(seen_SS: np.ndarray, block: Block, queries: np.ndarray, keys: np.ndarray) -> None:
    """Add one to each pair of tokens that the block computes."""
    q, k = block.cu_seqlens_q.tolist(), block.cu_seqlens_k.tolist()
    for number in range(len(q) - 1):
        rows, columns = queries[q[number] : q[number + 1]], keys[k[number] : k[number + 1]]
        pairs = np.ones((len(rows), len(columns)), dtype=int)
        seen_SS[np.ix_(rows, columns)] += np.tril(pairs) if block.causal else pairs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("row", ROWS)
def test_every_visible_pair_is_computed_once(row: str, causal: bool) -> None:
    cu_seqlens = bounds(ROWS[row])
    document = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    visible = (document[:, None] == document) & (np.tril(np.ones((240, 240), dtype=bool)) if causal else True)
    for ring in RINGS:
        shards, seen = shard_order(cu_seqlens, ring), np.zeros((240, 240), dtype=int)
        for rank in range(ring):
            plan = plan_ring(cu_seqlens, ring, rank, causal=causal)
            for step, block in enumerate(plan.blocks):
                if block is not None:
                    keys = shards[(rank - step) % ring]
                    _mark(seen, block, _tokens(block.queries, shards[rank]), _tokens(block.keys, keys))
        assert (seen == visible).all()


@pytest.mark.parametrize("row", ROWS)
def test_blocks_describe_themselves_rightly(row: str) -> None:
    for rank in range(4):
        plan = plan_ring(bounds(ROWS[row]), 4, rank)
        assert (plan.num_ranks, plan.rank, plan.num_tokens, len(plan.blocks)) == (4, rank, 60, 4)
        assert plan.num_documents == sum(length > 0 for length in ROWS[row])
        for step, block in enumerate(plan.blocks):
            if block is None:
                continue
            assert block.causal == (step == 0) and block.partial
            sides = (
                (block.queries, block.cu_seqlens_q, block.lengths_q, block.max_q),
                (block.keys, block.cu_seqlens_k, block.lengths_k, block.max_k),
            )
            for tokens, cu_seqlens, lengths, longest in sides:
                assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0
                assert tuple(cu_seqlens.diff().tolist()) == lengths and max(lengths) == longest and min(lengths) > 0
                assert sum(lengths) == tokens.length == len(tokens.take(torch.arange(60)))


def test_one_document_needs_no_index() -> None:
    for causal in (True, False):
        for rank in range(4):
            blocks = _blocks(plan_ring(bounds([240]), 4, rank, causal=causal))
            assert all(block.queries.index is None and block.keys.index is None for block in blocks)


def test_later_queries_are_chosen_once() -> None:
    plan = plan_ring(bounds([64] * 10), 8, 1)
    blocks = _blocks(plan)
    # Rank 1 is before ranks 2 to 7, whose blocks come at steps 2 to 7, and behind rank 0.
    assert len({id(block.queries) for block in blocks[2:]}) == 1 and blocks[2].queries.index is not None
    assert blocks[0].queries is blocks[1].queries


def test_ranks_compute_alike() -> None:
    """Zigzag's point: at each step all ranks have as many pairs, but for documents' surplus tokens."""
    for step in range(4):
        pairs = [_num_pairs(plan_ring(bounds([512, 1024, 256]), 4, rank).blocks[step]) for rank in range(4)]
        assert len(set(pairs)) == 1


def test_single_token_documents_have_no_foreign_blocks() -> None:
    plan = plan_ring(bounds([1] * 16), 4, 2)
    assert plan.blocks[0] is not None and plan.blocks[1:] == (None, None, None)


def test_row_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="10 tokens does not divide over 4"):
        plan_ring(bounds([10]), 4, 0)


def _blocks(plan: RingPlan) -> list[Block]:
    return [block for block in plan.blocks if block is not None]


def _num_pairs(block: Block | None) -> int:
    assert block is not None
    pairs = zip(block.lengths_q, block.lengths_k, strict=True)
    return sum(q * (q + 1) // 2 if block.causal else q * k for q, k in pairs)
