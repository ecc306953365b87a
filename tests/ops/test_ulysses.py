"""Ulysses x ring on gloo ranks against the whole row's attention in fp64, and the bytes that both send."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from whole_row import ROWS, bounds, random_inputs, whole_row, worst

from megamed.ops.ring_plan import plan_ring
from megamed.ops.traffic import Traffic, context_traffic, ring_traffic, ulysses_traffic
from megamed.ops.ulysses import context_attention, kv_copies, pick_split
from megamed.ops.zigzag import shard_order
from megamed.testing.ranks import RankPool
from megamed.utils import UserError

# fp64 rounding, 1.1e-16 a step, over sums of some hundred terms; seen: below 1e-14.
EXACT = 1e-12
HEAD_DIM = 16


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Bytes that leave this rank."""
    sent: list[int] = []
    originals = dist.batch_isend_irecv, dist.all_to_all_single

    def hops(ops: list[dist.P2POp]) -> Any:
        sent.extend(op.tensor.numel() * op.tensor.element_size() for op in ops if op.op is dist.isend)
        return originals[0](ops)

    def all_to_all(received: torch.Tensor, x: torch.Tensor, group: dist.ProcessGroup) -> Any:
        size = dist.get_world_size(group)
        sent.append(x.numel() * x.element_size() * (size - 1) // size)
        return originals[1](received, x, group=group)

    dist.batch_isend_irecv, dist.all_to_all_single = hops, all_to_all
    try:
        yield sent
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = originals


def _groups(ring: int, ulysses: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    rank = dist.get_rank()
    rings = [dist.new_group([r * ulysses + u for r in range(ring)]) for u in range(ulysses)]
    inside = [dist.new_group([r * ulysses + u for u in range(ulysses)]) for r in range(ring)]
    return rings[rank % ulysses], inside[rank // ulysses]


def _cases(ring: int, ulysses: int, heads: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[float, Traffic]]:
    """The error, and the bytes that this rank sent, of every choice of heads and documents."""
    ring_group, ulysses_group = _groups(ring, ulysses)
    ring_rank, ulysses_rank = divmod(dist.get_rank(), ulysses)
    results = []
    for num_heads, num_kv_heads in heads:
        inputs = random_inputs(240, num_heads, num_kv_heads, HEAD_DIM, dtype=dtype)
        for lengths in (ROWS["uneven documents"], ROWS["shorter than 2R"]):
            cu_seqlens = bounds(lengths)
            shard = torch.from_numpy(shard_order(cu_seqlens, ring)[ring_rank])
            tokens = shard.chunk(ulysses)[ulysses_rank]
            q, k, v = (x[tokens].requires_grad_() for x in inputs[:3])
            plan = plan_ring(cu_seqlens, ring, ring_rank)
            with _counted() as forward:
                out = context_attention(q, k, v, plan, ring_group, ulysses_group)
            with _counted() as backward:
                grads = torch.autograd.grad(out, (q, k, v), inputs[3][tokens])
            references = [ref[tokens] for ref in whole_row(*inputs, cu_seqlens, True)]
            error = worst([out.detach(), *grads], references)
            results.append((error, Traffic(sum(forward), sum(backward))))
    return results


@pytest.mark.parametrize(
    "ring, ulysses, heads",
    [
        (1, 1, [(4, 2)]),
        (4, 1, [(4, 2)]),
        (2, 2, [(4, 2), (4, 1), (6, 6)]),
        # Fewer key/value heads than ranks, and 6, which 4 does not divide.
        (1, 4, [(8, 4), (4, 1), (8, 2), (24, 6)]),
        (4, 2, [(4, 2), (4, 1)]),
        (2, 4, [(8, 4), (8, 2), (4, 1)]),
    ],
)
def test_exact_and_bytes(ranks: RankPool, ring: int, ulysses: int, heads: list[tuple[int, int]]) -> None:
    world = ring * ulysses
    for results in ranks.run(_cases, world, ring, ulysses, heads, torch.float64):
        assert all(error < EXACT for error, _ in results)
        formula = [context_traffic(240 // world, *n, HEAD_DIM, 8, ring, ulysses) for n in heads]
        assert [sent for _, sent in results] == [traffic for traffic in formula for _ in range(2)]


def test_bytes_in_bf16(ranks: RankPool) -> None:
    """Keys and values travel in the inputs' type, their gradients in fp32."""
    for results in ranks.run(_cases, 4, 2, 2, [(4, 2)], torch.bfloat16):
        assert results[0][1] == context_traffic(60, 4, 2, HEAD_DIM, 2, 2, 2)


def test_traffic_by_hand() -> None:
    # 3 hops of 2 x 10 x 4 x 8 values: forward 2 bytes each; backward 2 again, and 4 for the gradients.
    assert ring_traffic(10, 4, 8, 2, 4) == Traffic(3 * 640 * 2, 3 * 640 * 6)
    # Half of 2 x 8 + 2 x 4 heads, 10 x 8 values each, 2 bytes.
    assert ulysses_traffic(10, 8, 4, 8, 2, 2) == Traffic(12 * 80 * 2, 12 * 80 * 2)
    # One key/value head for each of 4 ranks: sent 4 times.
    assert ulysses_traffic(10, 8, 1, 8, 2, 4) == Traffic(24 * 80 * 2 * 3 // 4, 24 * 80 * 2 * 3 // 4)
    assert context_traffic(10, 8, 4, 8, 2, 1, 1) == Traffic(0, 0)


def test_copies_of_key_value_heads() -> None:
    assert [kv_copies(48, 8, ulysses) for ulysses in (1, 2, 4, 8, 16, 48)] == [1, 1, 1, 1, 2, 6]
    assert kv_copies(24, 6, 4) == 2
    with pytest.raises(UserError, match="attention.ulysses=16 does not fit 8 query heads"):
        kv_copies(8, 8, 16)
    with pytest.raises(UserError, match="attention.ulysses=3 does not fit 8 query heads and 2"):
        kv_copies(8, 2, 3)


@pytest.mark.parametrize(
    "context, heads, kv_heads, most, split",
    [
        (1, 32, 8, 8, (1, 1)),
        (8, 32, 8, 8, (1, 8)),
        (64, 32, 8, 8, (8, 8)),
        (8, 32, 8, 6, (2, 4)),
        (8, 32, 8, 1, (8, 1)),
        (8, 8, 2, 8, (4, 2)),
        (6, 48, 8, 8, (3, 2)),
        (8, 12, 1, 8, (8, 1)),
        (7, 32, 8, 8, (7, 1)),
    ],
)
def test_split(context: int, heads: int, kv_heads: int, most: int, split: tuple[int, int]) -> None:
    assert pick_split(context, heads, kv_heads, most) == split


@pytest.mark.parametrize("num_heads, num_kv_heads", [(32, 8), (48, 8), (64, 8), (32, 32)])
def test_more_ulysses_ranks_send_less(num_heads: int, num_kv_heads: int) -> None:
    """What `pick_split` goes by: so it is as soon as 2 C > N / G + 1."""

    def sent(context: int, ulysses: int) -> int:
        traffic = context_traffic(4096, num_heads, num_kv_heads, 128, 2, context // ulysses, ulysses)
        return traffic.forward + traffic.backward

    for context in (2, 4, 8, 16, 64):
        less = 2 * context > num_heads // num_kv_heads + 1
        sizes = [size for size in (1, 2, 4, 8) if size <= context]
        for smaller, larger in zip(sizes, sizes[1:], strict=False):
            assert (sent(context, larger) < sent(context, smaller)) == less
