"""The language-model head and its cross-entropy, a chunk of tokens at a time, so that a row's logits never exist.

Logits are made for labelled tokens only, and made again in the backward pass: a token's gradient depends on what
the caller does with its loss. The vocabulary may be split over tensor-parallel ranks as in Megatron-LM (Shoeybi et
al. 2019, arXiv:1909.08053); the softmax is pieced together from each rank's maximum and sum, as in online
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).

Shapes: S tokens, N tokens with a label, R of these that this rank holds, C tokens of a chunk, H hidden size,
V words of this rank's part of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# A token with this label has no loss and passes through no head.
IGNORED_LABEL = -100
# What a chunk's logits may take in fp32; the backward pass takes half as much again for their bf16 copy. The sum
# of the weight's gradients is read and written once a chunk, which by the data sheet of an H100 takes as long as
# multiplying some 700 rows: chunks had better have more.
LOGITS_BYTES = 512 * 2**20


def chunked_cross_entropy(
    hidden_SH: Tensor,
    weight_VH: Tensor,
    labels_S: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    num_real_words: int | None = None,
    chunk_tokens: int | None = None,
    sequence_parallel: bool = False,
    labelled_N: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of each token, from the decoder's output: differentiable in `hidden_SH` and `weight_VH`.

    Takes memory for one chunk of logits, for the labelled rows of `hidden_SH`, and in the backward pass for an
    fp32 sum of the weight's gradients (where there is more than one chunk). Collective over `group`, whose ranks
    call it with the same labels; a row without any label works, and its gradients are zeros.

    What is rounded, with bf16 (or fp16) arguments: logits, softmax and all sums are fp32, straight from the matrix
    products; the gradient of the logits is rounded to bf16 for the two products that take it, and their two
    results are, once. So the loss does not suffer from logits in bf16, and a GPU takes no longer. (A CPU has no
    product of bf16 with a result in fp32, and copies its arguments to fp32 first.)

    Args:
        hidden_SH: the decoder's output; with `sequence_parallel`, this rank's [S / ranks, H] of it.
        weight_VH: this rank's rows of the head, as many on every rank, in the type of `hidden_SH`.
        labels_S: int64, index of the right word in the whole vocabulary, or `IGNORED_LABEL`; on every rank for all
            S tokens.
        group: the ranks that the vocabulary is split over; None where it is whole.
        num_real_words: how many of the rank's words, from the first, are words; the rest is padding without
            probability. None for all.
        chunk_tokens: C; None for as many as have `LOGITS_BYTES` of logits.
        sequence_parallel: the tokens are split over `group`, too.
        labelled_N: int64, ascending, on the host: where the labels are that are not ignored. None looks for them,
            and where they are on a GPU, waits for it.

    Returns:
        Losses [S] in nats, 0 where the label is ignored: fp32, or fp64 for fp64 arguments; the same on every rank.
    """
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    if labelled_N is None:
        labelled_N = torch.nonzero(labels_S != IGNORED_LABEL).squeeze(1).cpu()
    index_N = labelled_N.to(labels_S.device)
    first_row, index_R = 0, index_N
    if sequence_parallel and ranks > 1:
        owners = torch.bincount(labelled_N // len(hidden_SH), minlength=ranks).tolist()
        first_row = sum(owners[:rank])
        index_R = index_N[first_row : first_row + owners[rank]] - rank * len(hidden_SH)
    head = _Head(
        group=group if ranks > 1 else None,
        sequence_parallel=sequence_parallel and ranks > 1,
        first_word=rank * len(weight_VH),
        num_real_words=len(weight_VH) if num_real_words is None else num_real_words,
        chunk_tokens=chunk_tokens or max(LOGITS_BYTES // (4 * len(weight_VH)), 1),
        num_tokens=len(index_N),
        first_row=first_row,
    )
    rows_RH = hidden_SH if len(index_R) == len(hidden_SH) else hidden_SH.index_select(0, index_R)
    losses_N: Tensor = _Losses.apply(rows_RH, weight_VH, labels_S[index_N], head)
    return losses_N.new_zeros(len(labels_S)).index_copy(0, index_N, losses_N)


@dataclass(frozen=True)
class _Head:
    """Which part of the vocabulary and of the N labelled tokens is this rank's, and how they are cut up."""

    group: dist.ProcessGroup | None
    sequence_parallel: bool
    first_word: int
    num_real_words: int
    chunk_tokens: int
    num_tokens: int
    first_row: int
    """Of the N labelled tokens, the first that this rank holds."""

    def chunks(self) -> Iterator[slice]:
        for start in range(0, self.num_tokens, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, self.num_tokens))

    def mine(self, rows_RH: Tensor, chunk: slice) -> tuple[slice, slice]:
        """Where those of a chunk's tokens that this rank holds are: in its rows, and in the chunk."""
        start = min(max(chunk.start, self.first_row), self.first_row + len(rows_RH))
        end = min(max(chunk.stop, start), self.first_row + len(rows_RH))
        in_rows = slice(start - self.first_row, end - self.first_row)
        return in_rows, slice(start - chunk.start, end - chunk.start)

    def gather(self, rows_RH: Tensor, chunk: slice) -> Tensor:
        """A chunk's rows [C, H], on every rank."""
        if not self.sequence_parallel:
            return rows_RH[chunk]
        # Each row comes from one rank, and the others add zeros: exact, and as even over the ranks when one of
        # them holds all of a chunk, as a report's tokens behind its frames are held.
        rows_CH = rows_RH.new_zeros(chunk.stop - chunk.start, rows_RH.shape[1])
        in_rows, in_chunk = self.mine(rows_RH, chunk)
        rows_CH[in_chunk] = rows_RH[in_rows]
        dist.all_reduce(rows_CH, group=self.group)
        return rows_CH

    def logits(self, rows_CH: Tensor, weight_VH: Tensor) -> Tensor:
        """Logits [C, V] in the type of sums; those of the padding are the lowest number there is."""
        logits_CV = _product(rows_CH, weight_VH.t())
        # Silenced after the product, not left out of it: products of an odd width are slow on a GPU.
        logits_CV[:, self.num_real_words :] = torch.finfo(logits_CV.dtype).min
        return logits_CV

    def targets(self, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        """Each label's column, and whether this rank has that column; where not, the column is any."""
        words_C = labels_C - self.first_word
        here_C = (words_C >= 0) & (words_C < self.num_real_words)
        return words_C.where(here_C, 0), here_C


class _Losses(torch.autograd.Function):
    """Losses [N] of the labelled rows [R, H]."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, weight_VH: Tensor, labels_N: Tensor, head: _Head) -> Tensor:
        top_N = torch.empty(len(labels_N), dtype=_wide(rows_RH.dtype), device=rows_RH.device)
        sum_N, target_N = torch.empty_like(top_N), torch.empty_like(top_N)
        for chunk in head.chunks():
            rows_CH = head.gather(rows_RH, chunk)
            top_N[chunk], sum_N[chunk], target_N[chunk] = _statistics(head, rows_CH, weight_VH, labels_N[chunk])
        if head.group is not None and head.num_tokens:
            mine_N, top_N = top_N, top_N.clone()
            dist.all_reduce(top_N, op=dist.ReduceOp.MAX, group=head.group)
            parts_2N = torch.stack([sum_N * (mine_N - top_N).exp(), target_N])
            dist.all_reduce(parts_2N, group=head.group)
            sum_N, target_N = parts_2N.unbind()
        ctx.save_for_backward(rows_RH, weight_VH, labels_N, top_N, sum_N)
        ctx.head = head
        return sum_N.log() - (target_N - top_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        head: _Head = ctx.head
        rows_RH, weight_VH, labels_N, top_N, sum_N = ctx.saved_tensors
        grad_rows_RH = torch.empty_like(rows_RH)
        dtype = _wide(weight_VH.dtype) if head.num_tokens > head.chunk_tokens else weight_VH.dtype
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if ctx.needs_input_grad[1] else None
        for chunk in head.chunks():
            rows_CH = head.gather(rows_RH, chunk)
            grad_CV = _logits_gradient(
                head, rows_CH, weight_VH, labels_N[chunk], grad_N[chunk], top_N[chunk], sum_N[chunk]
            )
            grad_CH = _product(grad_CV, weight_VH)
            work = None
            if head.group is not None:  # the sum over the vocabulary, during the other product
                work = dist.all_reduce(grad_CH, group=head.group, async_op=True)
            if grad_weight_VH is not None:
                _add_product(grad_weight_VH, grad_CV.t(), rows_CH)
            if work is not None:
                work.wait()
            in_rows, in_chunk = head.mine(rows_RH, chunk)
            grad_rows_RH[in_rows] = grad_CH[in_chunk]
            del grad_CV, grad_CH  # before the next chunk's logits need room
        return grad_rows_RH, None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype), None, None


def _statistics(head: _Head, rows_CH: Tensor, weight_VH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token's logits on this rank: the largest; the sum of exp(logit - largest); the label's, or 0."""
    logits_CV = head.logits(rows_CH, weight_VH)
    words_C, here_C = head.targets(labels_C)
    target_C = logits_CV.gather(1, words_C[:, None]).squeeze(1).where(here_C, 0)
    top_C = logits_CV.amax(1)
    return top_C, logits_CV.sub_(top_C[:, None]).exp_().sum(1), target_C


def _logits_gradient(
    head: _Head, rows_CH: Tensor, weight_VH: Tensor, labels_C: Tensor, grad_C: Tensor, top_C: Tensor, sum_C: Tensor
) -> Tensor:
    """Gradient of a chunk's logits, in the type of the weight: (softmax - 1 at the label) x the loss's gradient."""
    terms_CV = head.logits(rows_CH, weight_VH).sub_(top_C[:, None]).exp_()
    words_C, here_C = head.targets(labels_C)
    terms_CV[torch.arange(len(words_C), device=words_C.device), words_C] -= sum_C.where(here_C, 0)
    narrow = terms_CV if terms_CV.dtype == weight_VH.dtype else torch.empty_like(terms_CV, dtype=weight_VH.dtype)
    return torch.mul(terms_CV, (grad_C / sum_C)[:, None], out=narrow)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums: fp32 for bf16, fp16 and fp32, and fp64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the type of sums, without rounding in between."""
    wide = _wide(a.dtype)
    if a.is_cuda and a.dtype != wide:
        return torch.mm(a, b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, which has their type or that of sums, without rounding in between."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
