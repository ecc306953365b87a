"""Puts a VLM on the mesh: builds this rank's parts and wraps them in Megatron's DDP."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megamed.models.language import AttentionConfig, build_language_chunks
from megamed.models.vlm import FrameEncoder, VLMConfig, init_frame_encoder
from megamed.parallel.init import init_language
from megamed.runtime import Mesh, current_device


@dataclass(frozen=True)
class PlacedModel:
    """This rank's parts of a VLM, ready to train."""

    language: list[DistributedDataParallel]
    """One for each virtual pipeline stage; gradients are reduced over the replicas."""
    vision: DistributedDataParallel
    """The frame encoder; gradients are summed over all ranks."""

    @property
    def parts(self) -> list[DistributedDataParallel]:
        """Everything that has parameters."""
        return [*self.language, self.vision]


def place(
    config: VLMConfig,
    attention: AttentionConfig,
    mesh: Mesh,
    dtype: torch.dtype,
    seed: int | None,
    distributed_optimizer: bool,
) -> PlacedModel:
    """Build, initialise and wrap the parts of the model that this rank holds.

    Args:
        config: the model.
        attention: how its attention is computed.
        mesh: the layout.
        dtype: type of parameters and activations; gradients are kept and reduced in fp32.
        seed: decides every initial weight, whatever the layout; None leaves them without values.
        distributed_optimizer: reduce-scatter gradients, for the distributed optimizer.
    """
    chunks = build_language_chunks(config.language, attention, mesh, dtype)
    if seed is not None:
        init_language(chunks, seed, config.language.init_std, config.language.num_layers)
    with torch.device("meta"):  # in the host's memory the largest tower would take 22 GB for each rank
        encoder = FrameEncoder(config.vision, config.projector).to(dtype)
    encoder.to_empty(device=current_device())
    if seed is not None:
        init_frame_encoder(encoder, seed)
    language = [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=_ddp_config(distributed_optimizer),
            module=chunk.to(current_device()),
            pg_collection=mesh.language,
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    vision = DistributedDataParallel(
        config=_vision_mcore(config, dtype),
        ddp_config=_ddp_config(distributed_optimizer),
        module=encoder,
        pg_collection=mesh.vision,
    )
    return PlacedModel(language, vision)


def _ddp_config(distributed_optimizer: bool) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=distributed_optimizer
    )


def _vision_mcore(config: VLMConfig, dtype: torch.dtype) -> TransformerConfig:
    """What Megatron's DDP reads of a module's configuration; the encoder itself has its own."""
    return TransformerConfig(
        num_layers=config.vision.num_layers,
        hidden_size=config.vision.hidden_size,
        num_attention_heads=config.vision.num_heads,
        # The gradients arrive as shares of one global loss, so they are summed, not averaged.
        calculate_per_token_loss=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
