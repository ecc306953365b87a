"""Builds the chunks of Megatron's `GPTModel` that one rank holds."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamed.models.language.config import LanguageConfig
from megamed.models.language.spec import decoder_block_spec
from megamed.runtime import ParallelConfig, has_transformer_engine


def build_language_chunks(
    config: LanguageConfig,
    parallel: ParallelConfig,
    groups: ProcessGroupCollection,
    dtype: torch.dtype,
    use_transformer_engine: bool | None = None,
) -> list[GPTModel]:
    """The model chunks of this rank, one for each virtual pipeline stage. Weights are not initialised.

    The logits of the padded vocabulary are the lowest number there is, so that padding is no token.

    Args:
        config: the model.
        parallel: the layout; decides how many layers this rank builds.
        groups: Megatron's process groups.
        dtype: parameter and activation type.
        use_transformer_engine: None takes it where it is present, but for fp32, which its attention has no
            kernel for.

    Raises:
        UserError: the model does not divide by the layout.
    """
    config.validate(parallel)
    te = use_transformer_engine
    if te is None:
        te = has_transformer_engine() and dtype != torch.float32
    # Unfused, Megatron's RoPE waits for the GPU in every layer, to read the documents' bounds.
    transformer = config.to_mcore(parallel, dtype, apply_rope_fusion=te)
    return [_chunk(config, transformer, groups, te, stage, parallel) for stage in range(parallel.virtual_pipeline)]


def _chunk(
    config: LanguageConfig,
    transformer: TransformerConfig,
    groups: ProcessGroupCollection,
    use_transformer_engine: bool,
    stage: int,
    parallel: ParallelConfig,
) -> GPTModel:
    rank, size = groups.pp.rank(), groups.pp.size()
    vp_stage = stage if parallel.virtual_pipeline > 1 else None
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=decoder_block_spec(
            transformer, config.rotary_base, use_transformer_engine, rank, vp_stage
        ),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_positions,
        pre_process=rank == 0 and stage == 0,
        post_process=rank == size - 1 and stage == parallel.virtual_pipeline - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=config.tie_embeddings,
        # Without Transformer Engine, the layers' own attention applies RoPE.
        position_embedding_type="rope" if use_transformer_engine else "none",
        rotary_base=int(config.rotary_base),
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if model.post_process:
        shard = config.padded_vocab_size // groups.tp.size()
        num_real = min(max(config.vocab_size - groups.tp.rank() * shard, 0), shard)
        if num_real < shard:
            _silence_padding(model.output_layer, num_real)
    return model


def _silence_padding(output_layer: nn.Module, num_real: int) -> None:
    """Give the padded vocabulary no probability: otherwise the softmax, hence the loss, would count it.

    Args:
        output_layer: returns (logits of this rank's part of the vocabulary, bias).
        num_real: columns of that part that are tokens; the others are padding.
    """

    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Tensor | None]) -> None:
        logits = output[0]
        # Autograd need not know, which saves a copy of the logits: with no probability there is no gradient.
        logits.detach()[..., num_real:].fill_(torch.finfo(logits.dtype).min)

    output_layer.register_forward_hook(hook)
