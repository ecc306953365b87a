"""Megatron's `GPTModel`, with losses that need no logits, and the chunks of it that one rank holds.

Shapes: S tokens of a packed row, B = 1, H hidden size.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megamed.models.language.attention import BuildAttend
from megamed.models.language.attention_config import AttentionConfig
from megamed.models.language.backends import build_attend
from megamed.models.language.config import LanguageConfig
from megamed.models.language.spec import decoder_block_spec
from megamed.models.moe import MoEConfig
from megamed.ops.cross_entropy import chunked_cross_entropy
from megamed.runtime import Mesh, has_transformer_engine
from megamed.utils import UserError


class LanguageModel(GPTModel):
    """Megatron's GPTModel, whose losses come from the decoder's output without the row's logits ever existing.

    Called with labels it returns losses [B, S] (0 where the label is `IGNORED_LABEL`), else logits, this rank's
    part of the vocabulary. Either way the padded vocabulary has no probability.

    Args:
        num_words: size of the vocabulary without padding.
        moe: settings of its experts, for whoever tells its routers what tokens are.
        arguments: those of `GPTModel`.
    """

    def __init__(self, num_words: int, moe: MoEConfig, **arguments: Any):
        super().__init__(**arguments)
        self.moe = moe
        tp = self.pg_collection.tp
        shard = self.vocab_size // tp.size()
        self.num_real_words = min(max(num_words - tp.rank() * shard, 0), shard)
        if self.post_process and self.num_real_words < shard:
            _silence_padding(self.output_layer, self.num_real_words)

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor | None, **others: Any
    ) -> Tensor:
        """Both megatron-core 0.16 and 0.19 end `GPTModel.forward` with this call."""
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, **others)
        tied = self.share_embeddings_and_output_weights
        losses_SB = chunked_cross_entropy(
            hidden_states.flatten(0, 1),
            self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
            labels.t().flatten(),
            group=self.pg_collection.tp,
            num_real_words=self.num_real_words,
            sequence_parallel=self.config.sequence_parallel,
            labelled_N=getattr(others.get("packed_seq_params"), "labelled_N", None),
        ).view(labels.t().shape)
        return losses_SB.t().contiguous()


def build_language_chunks(
    config: LanguageConfig,
    attention: AttentionConfig,
    mesh: Mesh,
    dtype: torch.dtype,
    use_transformer_engine: bool | None = None,
) -> list[LanguageModel]:
    """The model chunks of this rank, one for each virtual pipeline stage. Weights are not initialised.

    Args:
        config: the model.
        attention: how its attention is computed.
        mesh: the layout; decides which layers this rank builds.
        dtype: parameter and activation type.
        use_transformer_engine: None takes its layers where it is present, but for fp32, which is
            for comparisons.

    Raises:
        UserError: the model does not divide by the layout, or the attention or the experts cannot run here.
    """
    config.validate(mesh.config)
    te = use_transformer_engine
    if te is None:
        te = has_transformer_engine() and dtype != torch.float32
    if config.moe.grouped_gemm and not te:
        raise UserError(
            "model.language.moe.grouped_gemm is Transformer Engine's, which fp32 models are built without; leave it "
            "false, or train in bf16",
            everywhere=True,
        )
    transformer, attend = config.to_mcore(mesh.config, dtype), build_attend(attention, mesh)
    return [_chunk(config, transformer, mesh, attend, te, stage) for stage in range(mesh.config.virtual_pipeline)]


def _chunk(
    config: LanguageConfig,
    transformer: TransformerConfig,
    mesh: Mesh,
    attend: BuildAttend,
    use_transformer_engine: bool,
    stage: int,
) -> LanguageModel:
    groups, parallel = mesh.language, mesh.config
    rank, size = groups.pp.rank(), groups.pp.size()
    vp_stage = stage if parallel.virtual_pipeline > 1 else None
    return LanguageModel(
        num_words=config.vocab_size,
        moe=config.moe,
        config=transformer,
        transformer_layer_spec=decoder_block_spec(
            transformer, config.rotary, config.moe, attend, use_transformer_engine, rank, vp_stage
        ),
        vocab_size=config.padded_vocab_size,
        max_sequence_length=config.max_positions,
        pre_process=rank == 0 and stage == 0,
        post_process=rank == size - 1 and stage == parallel.virtual_pipeline - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="none",  # the layers' attention applies RoPE
        pg_collection=groups,
        vp_stage=vp_stage,
    )


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
