"""Ring attention on gloo ranks against the whole row's attention in fp64; what it sends, skips, keeps and repeats."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from whole_row import ROWS, bounds, random_inputs, whole_row, worst

from megamed.ops.kernels import KERNELS, BlockKernel
from megamed.ops.one_process import ring_in_one_process
from megamed.ops.ring_attention import MergedOutput, ring_attention
from megamed.ops.ring_plan import Tokens, plan_ring
from megamed.ops.zigzag import shard_order
from megamed.testing.ranks import RankPool

# fp64 rounding, 1.1e-16 a step, over sums of some hundred terms; seen: below 1e-14.
EXACT = 1e-12


def _run(
    inputs: list[Tensor],
    lengths: list[int],
    causal: bool = True,
    kernel: BlockKernel | None = None,
    call: Callable[..., Any] = ring_attention,
    group: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """This rank's out, dq, dk, dv."""
    cu_seqlens, group = bounds(lengths), group or dist.group.WORLD
    ring, rank = dist.get_world_size(group), dist.get_rank(group)
    tokens = torch.from_numpy(shard_order(cu_seqlens, ring)[rank])
    q, k, v = (x[tokens].requires_grad_() for x in inputs[:3])
    plan = plan_ring(cu_seqlens, ring, rank, causal=causal)
    out = call(q, k, v, plan, group if ring > 1 else None, kernel)
    out.backward(inputs[3][tokens])
    return [out.detach(), *(x.grad for x in (q, k, v))]  # type: ignore[list-item]


def _mine(references: list[Tensor], lengths: list[int]) -> list[Tensor]:
    tokens = torch.from_numpy(shard_order(bounds(lengths), dist.get_world_size())[dist.get_rank()])
    return [ref[tokens] for ref in references]


def _errors() -> dict[str, float]:
    errors = {}
    for heads, kernels in {(4, 2): ("math", "cpu_flash"), (4, 4): ("cpu_flash",), (3, 1): ("cpu_flash",)}.items():
        inputs = random_inputs(240, *heads, 16)
        for causal in (True, False):
            for row, lengths in ROWS.items():
                references = _mine(whole_row(*inputs, bounds(lengths), causal), lengths)
                for kernel in kernels:
                    name = f"{kernel}, heads {heads}, causal {causal}, {row}"
                    errors[name] = worst(_run(inputs, lengths, causal, KERNELS[kernel]), references)
    return errors


@pytest.mark.parametrize("ring", [1, 2, 3, 4, 8])
def test_exact(ranks: RankPool, ring: int) -> None:
    for errors in ranks.run(_errors, ring):
        assert {name: error for name, error in errors.items() if not error < EXACT} == {}


def _scaled_and_picked() -> float:
    inputs, lengths = random_inputs(240, 4, 2, 16), ROWS["uneven documents"]
    doubled = [inputs[0] * 2, *inputs[1:]]
    with_scale = _run(inputs, lengths, call=lambda q, k, v, plan, group, _: ring_attention(
        q, k, v, plan, group, scale=2 * q.shape[-1] ** -0.5
    ))
    without = _run(doubled, lengths)
    without[1] *= 2
    return worst(with_scale, without)


def test_scale(ranks: RankPool) -> None:
    assert max(ranks.run(_scaled_and_picked, 2)) < EXACT


def _same_bits_everywhere() -> bool:
    """Twice the same bits, those of one process, and those of both kinds of checkpointing; in fp32 and bf16."""

    def kept(reentrant: bool) -> Callable[..., Any]:
        return lambda *args: checkpoint(ring_attention, *args, use_reentrant=reentrant)

    world, same = dist.get_world_size(), True
    for dtype in (torch.float32, torch.bfloat16):
        for row in ("uneven documents", "shorter than 2R"):
            inputs = random_inputs(240, 4, 2, 16, dtype=dtype)
            first = _run(inputs, ROWS[row])
            alone = ring_in_one_process(*inputs, bounds(ROWS[row]), world, KERNELS["cpu_flash"])
            others = [_run(inputs, ROWS[row]), _mine(list(alone), ROWS[row])]
            others += [_run(inputs, ROWS[row], call=kept(reentrant)) for reentrant in (True, False)]
            for other in others:
                same &= all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(first, other, strict=True))
    return same


@pytest.mark.parametrize("ring", [2, 4])
def test_same_bits_again_alone_and_checkpointed(ranks: RankPool, ring: int) -> None:
    assert all(ranks.run(_same_bits_everywhere, ring))


class _Recorded:
    """A kernel that notes when it is called."""

    name = "recorded"

    def __init__(self, events: list[str]):
        self.events = events

    def unavailable(self, *_: Any) -> None:
        return None

    def forward(self, *args: Any) -> Any:
        self.events.append("compute")
        return KERNELS["math"].forward(*args)

    def backward(self, *args: Any) -> Any:
        self.events.append("compute")
        return KERNELS["math"].backward(*args)


def _events(lengths: list[int]) -> tuple[list[str], list[str]]:
    """What happens in the two passes, in order: `send KIND`, `wait`, `compute`."""
    events: list[str] = []
    original = dist.batch_isend_irecv

    class Noted:
        def __init__(self, work: Any):
            self.work = work

        def wait(self) -> None:
            events.append("wait")
            self.work.wait()

    def noted(hops: list[dist.P2POp]) -> list[Any]:
        events.append("send keys" if hops[0].tensor.dtype == torch.bfloat16 else "send gradients")
        works = original(hops)
        # One of two, so that a hop is waited for once in the record.
        return [Noted(works[0]), *works[1:]]

    tokens = torch.from_numpy(shard_order(bounds(lengths), dist.get_world_size())[dist.get_rank()])
    inputs = [x[tokens] for x in random_inputs(sum(lengths), 4, 2, 16, dtype=torch.bfloat16)]
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    dist.batch_isend_irecv = noted
    try:
        plan = plan_ring(bounds(lengths), dist.get_world_size(), dist.get_rank())
        out = ring_attention(q, k, v, plan, dist.group.WORLD, _Recorded(events))
        forward = list(events)
        events.clear()
        out.backward(inputs[3])
    finally:
        dist.batch_isend_irecv = original
    return forward, list(events)


def test_next_hop_is_under_way_while_a_block_is_computed(ranks: RankPool) -> None:
    for forward, backward in ranks.run(_events, 4, [96, 32]):
        assert forward == ["send keys", "compute", "wait"] * 3 + ["compute"]
        assert backward == [
            "send keys", "compute",  # half of the own block
            "wait", "send keys", "compute", "send gradients",
            "wait", "send keys", "compute", "wait", "send gradients",
            "wait", "compute", "wait", "send gradients",
            "compute", "wait",  # the other half, while the gradients come home
        ]  # fmt: skip


def test_blocks_that_see_nothing_are_skipped(ranks: RankPool) -> None:
    # Documents of one token: no rank has another's; they travel all the same, since others may have.
    for forward, backward in ranks.run(_events, 4, [1] * 64):
        assert forward.count("compute") == 1 and forward.count("send keys") == 3
        assert backward.count("compute") == 2 and backward.count("send gradients") == 3


def _within_a_subgroup() -> float:
    """Two rings side by side, of ranks that are no multiple of one another."""
    groups = [dist.new_group([3, 1]), dist.new_group([0, 2])]
    group = groups[dist.get_rank() % 2 == 0]
    inputs, lengths = random_inputs(240, 4, 2, 16, seed=dist.get_rank() % 2), ROWS["uneven documents"]
    ring_rank = dist.get_rank(group)
    tokens = torch.from_numpy(shard_order(bounds(lengths), 2)[ring_rank])
    references = [ref[tokens] for ref in whole_row(*inputs, bounds(lengths), True)]
    return worst(_run(inputs, lengths, group=group), references)


def test_subgroups(ranks: RankPool) -> None:
    assert max(ranks.run(_within_a_subgroup, 4)) < EXACT


def test_one_rank_needs_no_process_group() -> None:
    inputs, cu_seqlens = random_inputs(240, 4, 2, 16), bounds(ROWS["uneven documents"])
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out = ring_attention(q, k, v, plan_ring(cu_seqlens, 1, 0), None)
    grads = torch.autograd.grad(out, (q, k, v), inputs[3])
    assert worst([out.detach(), *grads], whole_row(*inputs, cu_seqlens, True)) < EXACT


def test_queries_without_keys_do_not_spoil_the_merge() -> None:
    """flash-attn reports +inf for them, others -inf."""
    everything = Tokens(0, 2, None)
    for nothing in (torch.inf, -torch.inf):
        merged = MergedOutput()
        merged.add(everything, torch.zeros(2, 1, 4), torch.tensor([[-torch.inf, 1.0]]))
        merged.add(everything, torch.ones(2, 1, 4), torch.tensor([[nothing, nothing]]))
        merged.add(everything, torch.full((2, 1, 4), 3.0), torch.tensor([[-torch.inf, 1.0]]))
        out, lse = merged.result(torch.float32)
        assert out[0].eq(0).all() and out[1].eq(1.5).all()
        assert lse[0, 0] == -torch.inf and lse[0, 1] == pytest.approx(1 + torch.tensor(2.0).log().item())
