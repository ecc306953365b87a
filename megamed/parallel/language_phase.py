"""The language phase: microbatches with their visual tokens, as Megatron's schedules take them.

Shapes: S tokens of a packed row, B = 1, H hidden size, R visual tokens of this rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megamed.data import Microbatch
from megamed.models.language import Packing
from megamed.models.moe import routing_mask
from megamed.models.vlm import embed_with_visual_tokens
from megamed.ops.cross_entropy import IGNORED_LABEL
from megamed.parallel.sequence import row_order, sequence_shards, splits_sequence
from megamed.runtime import Mesh, current_device

# Matrix products on a GPU want sizes that are multiples of this.
ROW_MULTIPLE = 16


class Finish(Protocol):
    """Turns the last stage's output for one microbatch into what Megatron's schedule takes of a loss function."""

    def __call__(self, output: Tensor, item: "LanguageInput") -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class LanguageInput:
    """A microbatch as the language model takes it, on this rank's device: the context rank's part of the row."""

    tokens_BS: Tensor
    position_BS: Tensor
    labels_BS: Tensor
    """`IGNORED_LABEL` where the label is without meaning."""
    loss_kind_BS: Tensor
    padding_BS: Tensor
    """True where this rank's part of the row is padding; with sequence parallelism, the tensor-parallel rank's."""
    specialty_BS: Tensor
    """Specialties of the same tokens, bit i for the i-th."""
    packing: Packing
    rows_RH: Tensor
    """Visual tokens that fall into this rank's part of the row."""
    index_R: Tensor
    """Where they go within that part."""
    row_index_S: Tensor
    """Where in the packed row the tokens of this context rank stand."""


def trim_padding(microbatches: Sequence[Microbatch], mesh: Mesh) -> list[Microbatch]:
    """Rows without the padding at their end, to the next multiple of `ROW_MULTIPLE`.

    Rows keep their one length where other ranks count on it: between pipeline stages, and between replicas that
    share experts. Ranks that share a row cut it alike.
    """
    config = mesh.config
    if config.pipeline > 1 or config.expert > 1:
        return list(microbatches)
    return [_trim(m, ROW_MULTIPLE * config.context * (config.tensor if config.sequence else 1)) for m in microbatches]


def _trim(microbatch: Microbatch, multiple: int) -> Microbatch:
    length = -(-max(microbatch.end, 1) // multiple) * multiple
    if length >= len(microbatch.tokens_S):
        return microbatch
    bounds = microbatch.cu_seqlens
    return replace(
        microbatch,
        tokens_S=microbatch.tokens_S[:length],
        labels_S=microbatch.labels_S[:length],
        loss_kind_S=microbatch.loss_kind_S[:length],
        position_S=microbatch.position_S[:length],
        padding_S=microbatch.padding_S[:length],
        specialty_S=microbatch.specialty_S[:length],
        cu_seqlens=torch.cat([bounds[bounds < length], bounds.new_tensor([length])]),
    )


def language_input(microbatch: Microbatch, rows_RH: Tensor, mesh: Mesh) -> LanguageInput:
    """Put this rank's part of one microbatch on the device.

    Args:
        microbatch: the packed row, whole.
        rows_RH: this rank's visual tokens from the vision phase.
        mesh: the layout.
    """
    device, context = current_device(), mesh.config.context
    order = row_order(microbatch, mesh)
    part_S = torch.from_numpy(order.of_context_rank(mesh.context_rank, context))
    shard = sequence_shards(mesh, len(order.order_S))[mesh.replica.rank()]
    place = torch.from_numpy(order.place_S)[microbatch.visual_positions]
    inside = place[(place >= shard.start) & (place < shard.end)] - shard.start

    def of_this_rank(x_S: Tensor) -> Tensor:
        return x_S[part_S].to(device)

    position_S = of_this_rank(microbatch.position_S)

    def of_this_router(x_S: Tensor) -> Tensor:
        """With sequence parallelism, the experts' router has the tensor-parallel rank's part alone."""
        x_BS = of_this_rank(x_S)[None]
        if not splits_sequence(mesh):
            return x_BS
        return x_BS.chunk(mesh.config.tensor, dim=1)[mesh.language.tp.rank()].contiguous()

    packing = Packing.of_row(microbatch.cu_seqlens, position_S, mesh.ring.size(), mesh.ring.rank())
    packing.labelled_N = microbatch.loss_kind_S[part_S].nonzero().squeeze(1)
    return LanguageInput(
        tokens_BS=of_this_rank(microbatch.tokens_S)[None],
        position_BS=position_S[None],
        labels_BS=of_this_rank(microbatch.labels_S.masked_fill(microbatch.loss_kind_S == 0, IGNORED_LABEL))[None],
        loss_kind_BS=of_this_rank(microbatch.loss_kind_S)[None].long(),
        padding_BS=of_this_router(microbatch.padding_S),
        specialty_BS=of_this_router(microbatch.specialty_S),
        packing=packing,
        rows_RH=rows_RH,
        index_R=inside.to(device),
        row_index_S=part_S.to(device),
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
        # Megatron takes the length of the whole row and divides it by the context size.
        seq_length=inputs[0].tokens_BS.shape[1] * chunks[0].config.context_parallel_size,
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
    routing_mask_BSX = None
    if model.config.num_moe_experts:
        routing_mask_BSX = routing_mask(item.padding_BS, item.specialty_BS, len(model.moe.resolved.specialties))
    output = chunk(
        item.tokens_BS,
        item.position_BS,
        None,
        decoder_input=decoder_input,
        labels=item.labels_BS if with_labels else None,
        packed_seq_params=item.packing,
        padding_mask=routing_mask_BSX,
    )
    return output, partial(finish, item=item)
