"""The language phase: microbatches with their visual tokens, as Megatron's schedules take them.

Shapes: S tokens of a packed row, B = 1, H hidden size, R visual tokens of this rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megamed.data import Microbatch
from megamed.models.vlm import embed_with_visual_tokens
from megamed.parallel.exchange import Shard
from megamed.runtime import Mesh, current_device

# Matrix products on a GPU want sizes that are multiples of this.
ROW_MULTIPLE = 16


class Finish(Protocol):
    """Turns the last stage's output for one microbatch into what Megatron's schedule takes of a loss function."""

    def __call__(self, output: Tensor, item: "LanguageInput") -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class LanguageInput:
    """A microbatch as the language model takes it, on this rank's device."""

    tokens_BS: Tensor
    position_BS: Tensor
    labels_BS: Tensor
    loss_kind_BS: Tensor
    padding_BS: Tensor
    """True where this rank's part of the row is padding."""
    packing: PackedSeqParams
    rows_RH: Tensor
    """Visual tokens that fall into this rank's part of the row."""
    index_R: Tensor
    """Where they go within that part."""


def trim_padding(microbatches: Sequence[Microbatch], mesh: Mesh) -> list[Microbatch]:
    """Rows without the padding at their end, to the next multiple of `ROW_MULTIPLE`.

    Rows keep their one length where other ranks count on it: between pipeline stages, under sequence
    parallelism, and between replicas that share experts.
    """
    config = mesh.config
    if config.pipeline > 1 or config.expert > 1 or (config.sequence and config.tensor > 1):
        return list(microbatches)
    return [_trim(m) for m in microbatches]


def _trim(microbatch: Microbatch) -> Microbatch:
    length = -(-max(microbatch.num_real, 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    if length >= len(microbatch.tokens_S):
        return microbatch
    bounds = microbatch.cu_seqlens
    return replace(
        microbatch,
        tokens_S=microbatch.tokens_S[:length],
        labels_S=microbatch.labels_S[:length],
        loss_kind_S=microbatch.loss_kind_S[:length],
        position_S=microbatch.position_S[:length],
        cu_seqlens=torch.cat([bounds[bounds < length], bounds.new_tensor([length])]),
    )


def language_input(microbatch: Microbatch, rows_RH: Tensor, shard: Shard, mesh: Mesh) -> LanguageInput:
    """Put one microbatch on the device.

    Args:
        microbatch: the packed row, whole.
        rows_RH: its visual tokens from the vision phase.
        shard: this rank's part of the row.
        mesh: the layout.
    """
    device = current_device()
    positions = microbatch.visual_positions
    inside = positions[(positions >= shard.start) & (positions < shard.end)] - shard.start
    bounds = microbatch.cu_seqlens.to(torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    bounds = bounds.to(device)
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    padding_BS = torch.arange(len(microbatch.tokens_S), device=device)[None] >= microbatch.num_real
    if mesh.config.sequence and mesh.config.tensor > 1:
        # The experts' router sees this rank's part of the row alone; so must the mask.
        padding_BS = padding_BS.chunk(mesh.config.tensor, dim=1)[mesh.language.tp.rank()].contiguous()
    return LanguageInput(
        tokens_BS=microbatch.tokens_S[None].to(device),
        position_BS=microbatch.position_S[None].to(device),
        labels_BS=microbatch.labels_S[None].to(device),
        loss_kind_BS=microbatch.loss_kind_S[None].to(device).long(),
        padding_BS=padding_BS,
        packing=packing,
        rows_RH=rows_RH,
        index_R=inside.to(device),
    )


def run_schedule(
    chunks: Sequence[DistributedDataParallel],
    inputs: Sequence[LanguageInput],
    finish: Finish,
    with_labels: bool,
    train: bool,
) -> list[Any]:
    """Run Megatron's schedule (none, 1F1B or interleaved) over all microbatches of this replica.

    Args:
        chunks: this rank's model chunks.
        inputs: the microbatches, in order.
        finish: called on the last stage, with the loss of each token [B, S] if `with_labels`, else the logits
            [B, S, vocabulary shard]; returns the loss to run back and a report.
        with_labels: compute losses rather than logits.
        train: also run backward.

    Returns:
        On the last stage, the reports that `finish` returned beside the loss; else an empty list.
    """
    iterators: list[Iterator[LanguageInput]] = [iter(inputs) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, finish=finish, with_labels=with_labels),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks) if len(iterators) > 1 else chunks[0],
        num_microbatches=len(inputs),
        seq_length=inputs[0].tokens_BS.shape[1],
        micro_batch_size=1,
        forward_only=not train,
    )


def _forward_step(
    iterator: Iterator[LanguageInput],
    chunk: DistributedDataParallel,
    finish: Finish,
    with_labels: bool,
) -> Any:
    item = next(iterator)
    model = chunk.module
    decoder_input = None
    if model.pre_process:
        decoder_input = embed_with_visual_tokens(model, item.tokens_BS, item.position_BS, item.rows_RH, item.index_R)
    output = chunk(
        item.tokens_BS,
        item.position_BS,
        None,
        decoder_input=decoder_input,
        labels=item.labels_BS if with_labels else None,
        packed_seq_params=item.packing,
        padding_mask=item.padding_BS if model.config.num_moe_experts else None,
    )
    return output, partial(finish, item=item)
