"""Chunked cross-entropy against torch's, over whole and split vocabularies, and what it allocates.

Shapes: S tokens, H hidden size, V words of the whole (padded) vocabulary, P of one rank's part.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamed.ops import cross_entropy
from megamed.ops.cross_entropy import IGNORED_LABEL, chunked_cross_entropy
from megamed.testing.ranks import RankPool


@dataclass(frozen=True)
class Case:
    """A row; `labelled` are the tokens with a label, None for all of them."""

    num_tokens: int = 48
    hidden: int = 12
    num_words: int = 50
    padded: int = 64
    chunk_tokens: int | None = 5
    labelled: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    sequence_parallel: bool = False
    device: str = "cpu"

    def row(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, weight, labels, and the gradient that each loss gets."""
        generator = torch.Generator().manual_seed(4)
        # Times 3: confident and hesitant tokens, as a trained model has.
        hidden_SH = 3 * torch.randn(self.num_tokens, self.hidden, generator=generator, dtype=torch.float64)
        weight_VH = torch.randn(self.padded, self.hidden, generator=generator, dtype=torch.float64)
        labels_S = torch.randint(self.num_words, (self.num_tokens,), generator=generator)
        if self.labelled is not None:
            chosen = labels_S[list(self.labelled)]
            labels_S = torch.full_like(labels_S, IGNORED_LABEL)
            labels_S[list(self.labelled)] = chosen
        gradient_S = torch.randn(self.num_tokens, generator=generator, dtype=torch.float64)
        narrow = (hidden_SH.to(self.device, self.dtype), weight_VH.to(self.device, self.dtype))
        return *narrow, labels_S.to(self.device), gradient_S.to(self.device)


Result = tuple[Tensor, Tensor, Tensor]  # losses, gradient of the hidden states, gradient of the weight


def whole_logits(case: Case, dtype: torch.dtype) -> Result:
    """torch's cross-entropy on the same (rounded) row: one product in `dtype`, fp32 logits or wider."""
    hidden_SH, weight_VH, labels_S, gradient_S = case.row()
    hidden_SH, weight_VH = (x.to(dtype).requires_grad_() for x in (hidden_SH, weight_VH))
    logits_SV = (hidden_SH @ weight_VH[: case.num_words].t()).to(torch.promote_types(dtype, torch.float32))
    losses_S = F.cross_entropy(logits_SV, labels_S, reduction="none", ignore_index=IGNORED_LABEL)
    losses_S.backward(gradient_S.to(losses_S.dtype))
    return losses_S.detach(), hidden_SH.grad, weight_VH.grad


def chunked(case: Case) -> Result:
    """What this rank computes of the row, with the vocabulary split over all ranks there are."""
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks, rank = (group.size(), group.rank()) if group else (1, 0)
    hidden_SH, weight_VH, labels_S, gradient_S = case.row()
    if case.sequence_parallel:
        hidden_SH = hidden_SH.chunk(ranks)[rank]
    hidden_SH, weight_PH = hidden_SH.clone().requires_grad_(), weight_VH.chunk(ranks)[rank].clone().requires_grad_()
    losses_S = chunked_cross_entropy(
        hidden_SH, weight_PH, labels_S, group=group, chunk_tokens=case.chunk_tokens,
        num_real_words=min(max(case.num_words - rank * len(weight_PH), 0), len(weight_PH)),
        sequence_parallel=case.sequence_parallel,
    )  # fmt: skip
    losses_S.backward(gradient_S.to(losses_S.dtype))
    if group:  # with nothing to sum a rank would be gone before the others have found it
        dist.barrier()
    return losses_S.detach(), hidden_SH.grad, weight_PH.grad


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-300))


MASKS = {
    "all": None,
    "few": (0, 1, 17, 30, 31, 47),
    "behind": tuple(range(37, 48)),  # on the last rank alone, with sequence parallelism
    "one": (20,),
    "none": (),
}


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 48, 100])
@pytest.mark.parametrize("mask", MASKS)
def test_one_process_equals_torch(mask: str, chunk_tokens: int | None) -> None:
    case = Case(labelled=MASKS[mask], chunk_tokens=chunk_tokens)
    expected = whole_logits(case, torch.float64)
    for found, wanted in zip(chunked(case), expected, strict=True):
        assert found.shape == wanted.shape and found.dtype == wanted.dtype
        assert worst(found, wanted) < 1e-14  # fp64, sums of at most 64 terms in another order
    losses_S, grad_SH, grad_VH = chunked(case)
    if case.labelled is not None:
        without = [i for i in range(case.num_tokens) if i not in case.labelled]
        assert not losses_S[without].any() and not grad_SH[without].any()
    assert not grad_VH[case.num_words :].any(), "the padding has no probability"
    assert bool(grad_VH.any()) == (mask != "none")


def test_gradients_equal_finite_differences() -> None:
    hidden_SH, weight_VH, labels_S, _ = Case(num_tokens=7, hidden=3, num_words=6, padded=8, labelled=(1, 2, 6)).row()

    def losses(hidden_SH: Tensor, weight_VH: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden_SH, weight_VH, labels_S, num_real_words=6, chunk_tokens=2)

    assert torch.autograd.gradcheck(losses, (hidden_SH.requires_grad_(), weight_VH.requires_grad_()))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks_in_group", [2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_split_vocabulary_equals_whole(
    mask: str, ranks_in_group: int, sequence_parallel: bool, ranks: RankPool
) -> None:
    """With 4 ranks one has 2 words and 14 of padding; with 20 words, two have padding alone."""
    for num_words in (50, 20):
        case = Case(labelled=MASKS[mask], num_words=num_words, sequence_parallel=sequence_parallel)
        losses_S, grad_SH, grad_VH = whole_logits(case, torch.float64)
        results = ranks.run(chunked, ranks_in_group, case)
        for found, _, _ in results:
            assert torch.equal(found, results[0][0]), "the ranks of a group have the same losses"
            assert worst(found, losses_S) < 1e-14
        if sequence_parallel:
            assert worst(torch.cat([grad for _, grad, _ in results]), grad_SH) < 1e-14
        else:
            assert all(worst(grad, grad_SH) < 1e-14 for _, grad, _ in results)
        assert worst(torch.cat([grad for *_, grad in results]), grad_VH) < 1e-14


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_bf16_is_at_least_as_exact_over_ranks(sequence_parallel: bool, ranks: RankPool) -> None:
    case = Case(256, 64, 1000, 1024, 50, dtype=torch.bfloat16, sequence_parallel=sequence_parallel)
    exact = whole_logits(case, torch.float64)
    plain = whole_logits(case, torch.bfloat16)
    results = ranks.run(chunked, 2, case)
    losses_S, grads_SH, grads_VH = zip(*results, strict=True)
    grad_SH = torch.cat(grads_SH) if sequence_parallel else grads_SH[0]
    check_bf16((losses_S[0], grad_SH, torch.cat(grads_VH)), plain, exact)


@pytest.mark.parametrize("chunk_tokens", [50, 256], ids=["chunks", "one chunk"])
def test_bf16_is_at_least_as_exact(chunk_tokens: int) -> None:
    case = Case(256, 64, 1000, 1024, chunk_tokens, dtype=torch.bfloat16)
    check_bf16(chunked(case), whole_logits(case, torch.bfloat16), whole_logits(case, torch.float64))


def test_the_gradient_of_the_weight_is_rounded_once_not_in_each_chunk() -> None:
    case = Case(256, 64, 1000, 1024, 256, dtype=torch.bfloat16)
    exact = whole_logits(case, torch.float64)[2]
    at_once, in_64_chunks = (chunked(replace(case, chunk_tokens=n))[2] for n in (256, 4))
    # Rounded in each chunk, the error is 11% larger here; once, and it is the same to 4 digits.
    assert norm_of_error(in_64_chunks, exact) < 1.05 * norm_of_error(at_once, exact)


def check_bf16(found: Result, plain: Result, exact: Result) -> None:
    """Ours against one product in bf16 with its logits in bf16, both measured against fp64."""
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == torch.bfloat16
    errors = [[norm_of_error(got, want) for got, want in zip(side, exact, strict=True)] for side in (found, plain)]
    assert errors[0][0] < 1e-5  # fp32 logits: its 1.2e-7, over 64 terms a logit and 1000 words
    assert errors[1][0] > 1e-3  # logits in bf16, which has 8 bits
    for ours, theirs in zip(errors[0][1:], errors[1][1:], strict=True):
        assert ours <= theirs, (ours, theirs)


def norm_of_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_small_losses_keep_their_digits() -> None:
    """A confident token's loss, 1e-5, beside logits of 60: their difference alone has 4e-6 of rounding in fp32."""
    hidden_SH, weight_VH = torch.tensor([[60.0, 48.5]]), torch.eye(2)
    losses_S = chunked_cross_entropy(hidden_SH, weight_VH, torch.tensor([0]))
    expected = F.cross_entropy(hidden_SH.double(), torch.tensor([0]))
    assert losses_S.item() == pytest.approx(expected.item(), rel=1e-2)  # 1 + 1e-5 in fp32 has 1% of 1e-5


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() for x in tree_leaves(out) if isinstance(x, Tensor))
        self.bytes = max(self.bytes, *sizes, 0)
        return out


@pytest.mark.parametrize("labelled", ["all", "every 50th"])
def test_no_allocation_grows_with_the_row(labelled: str) -> None:
    largest = {}
    for num_tokens in (200, 800):
        few = tuple(range(0, num_tokens, 50)) if labelled == "every 50th" else None
        hidden_SH, weight_VH, labels_S, gradient_S = Case(num_tokens, 8, 2000, 2048, labelled=few).row()
        hidden_SH, weight_VH = hidden_SH.float().requires_grad_(), weight_VH.float().requires_grad_()
        with Largest() as mode:
            losses_S = chunked_cross_entropy(hidden_SH, weight_VH, labels_S, num_real_words=2000, chunk_tokens=20)
            losses_S.backward(gradient_S.float())
        largest[num_tokens] = mode.bytes
    logits, weight = 2048 * 4, 2048 * 8 * 4
    if labelled == "all":
        assert largest == {200: 20 * logits, 800: 20 * logits}
    else:  # 4 and 16 labels: less than a chunk, and of the first row the weight's gradient is the largest
        assert largest == {200: weight, 800: 16 * logits}


def test_only_one_chunk_of_logits_is_held_at_a_time() -> None:
    """Also from one chunk to the next: the profiler's peak of all that is allocated."""
    hidden_SH, weight_VH, labels_S, gradient_S = Case(200, 8, 2000, 2048, dtype=torch.float32).row()
    with torch.profiler.profile(profile_memory=True) as profiler:
        losses_S = chunked_cross_entropy(
            hidden_SH.requires_grad_(), weight_VH.requires_grad_(), labels_S, chunk_tokens=20
        )
        losses_S.backward(gradient_S.float())
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak, now = 0, 0
    for change in changes:
        now += change
        peak = max(peak, now)
    chunk, weight = 20 * 2048 * 4, 2048 * 8 * 4
    assert chunk + weight < peak < 1.5 * chunk + weight  # logits and the sum of the weight's gradients


def test_a_chunk_has_the_documented_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cross_entropy.LOGITS_BYTES == 512 * 2**20
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 7 * 2048 * 4 + 1)
    shapes = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                shapes.append(tuple(out.shape))
            return out

    hidden_SH, weight_VH, labels_S, _ = Case(17, 8, 2000, 2048).row()
    with Products():
        chunked_cross_entropy(hidden_SH, weight_VH, labels_S)
    assert shapes == [(7, 2048), (7, 2048), (3, 2048)]


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden_SH, weight_VH, labels_S, gradient_S = Case(padded=50).row()
    losses_S = chunked_cross_entropy(hidden_SH.requires_grad_(), weight_VH, labels_S, chunk_tokens=7)
    losses_S.backward(gradient_S)
    assert weight_VH.grad is None
    assert worst(hidden_SH.grad, whole_logits(Case(padded=50), torch.float64)[1]) < 1e-14


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("chunk_tokens", [300, 4096], ids=["chunks", "one chunk"])
def test_bf16_on_a_gpu(chunk_tokens: int) -> None:
    case = Case(2048, 512, 30001, 30080, chunk_tokens, dtype=torch.bfloat16, device="cuda")
    check_bf16(chunked(case), whole_logits(case, torch.bfloat16), whole_logits(case, torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fp32_on_a_gpu() -> None:
    case = Case(2048, 512, 30001, 30080, 300, dtype=torch.float32, device="cuda")
    expected = whole_logits(case, torch.float64)
    for found, wanted in zip(chunked(case), expected, strict=True):
        assert worst(found, wanted) < 1e-4  # fp32 sums of 512 products, and of 30,001 words
