"""Settings of the language model, and the one place where Megatron's `TransformerConfig` is built."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megamed.models.language.rotary import RotaryConfig
from megamed.models.moe.config import MoEConfig
from megamed.runtime import ParallelConfig, device_type
from megamed.utils import UserError

# Padding the vocabulary to a fixed multiple, whatever the layout, keeps the embedding's global shape
# (hence its initial values and its checkpoint) the same for every tensor-parallel size that divides it.
VOCAB_MULTIPLE = 128


@dataclass
class LanguageConfig:
    """A decoder with RMSNorm, SwiGLU, grouped-query attention and RoPE: InternLM2, Qwen2.5, Qwen3, Llama."""

    vocab_size: int = 92553
    """Number of tokens, before padding."""
    hidden_size: int = 6144
    num_layers: int = 48
    num_heads: int = 48
    num_kv_heads: int = 8
    head_dim: int | None = None
    """Width of a head; None means hidden_size / num_heads."""
    intermediate_size: int = 16384
    """Width of the dense SwiGLU MLP."""
    norm_eps: float = 1e-5
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    max_positions: int = 32768
    """Longest document the model is made for, in tokens."""
    qkv_bias: bool = False
    """Bias on q, k and v (Qwen2.5)."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k (Qwen3)."""
    tie_embeddings: bool = False
    """The output layer uses the embedding's weight."""
    init_std: float = 0.02
    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    moe: MoEConfig = field(default_factory=MoEConfig)

    @property
    def kv_channels(self) -> int:
        """Width of a head, `head_dim` or what follows from the other sizes."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary with padding, a multiple of `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def validate(self, parallel: ParallelConfig) -> None:
        """Check the sizes against the layout.

        Raises:
            UserError: names the two keys that do not fit each other.
        """
        _divides("parallel.tensor", parallel.tensor, "model.language.num_heads", self.num_heads)
        _divides("parallel.tensor", parallel.tensor, "model.language.num_kv_heads", self.num_kv_heads)
        _divides("parallel.tensor", parallel.tensor, "model.language.intermediate_size", self.intermediate_size)
        _divides("parallel.tensor", parallel.tensor, "the padded vocabulary", self.padded_vocab_size)
        _divides("model.language.num_kv_heads", self.num_kv_heads, "model.language.num_heads", self.num_heads)
        if self.kv_channels % 2 or self.kv_channels < 4:
            raise UserError(
                f"heads of width {self.kv_channels} cannot be rotated: model.language.head_dim, or hidden_size / "
                "num_heads, has to be an even number above 2",
                everywhere=True,
            )
        chunks = parallel.pipeline * parallel.virtual_pipeline
        _divides("parallel.pipeline x parallel.virtual_pipeline", chunks, "model.language.num_layers", self.num_layers)
        self.moe.validate(parallel)
        if self.moe.total_experts:
            self._need_experts_on_every_stage(parallel)

    def _need_experts_on_every_stage(self, parallel: ParallelConfig) -> None:
        """With expert parallelism Megatron keeps experts in an optimizer of their own, which cannot be empty."""
        dense, first_chunk = self.moe.first_dense_layers, self.num_layers // parallel.pipeline
        if parallel.expert > 1 and parallel.virtual_pipeline == 1 and dense >= first_chunk:
            raise UserError(
                f"model.language.moe.first_dense_layers={dense} leaves the first pipeline stage, of {first_chunk} "
                "layers, without experts, which parallel.expert above 1 needs; lower parallel.pipeline or set "
                "parallel.virtual_pipeline=2",
                everywhere=True,
            )

    def to_mcore(self, parallel: ParallelConfig, dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
        """Build Megatron's configuration.

        Args:
            parallel: the layout of the job.
            dtype: what the layers compute in.
            overrides: fields of `TransformerConfig` set last, for callers that build single stages.
        """
        values: dict[str, Any] = dict(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_kv_heads,
            kv_channels=self.kv_channels,
            ffn_hidden_size=self.intermediate_size,
            layernorm_epsilon=self.norm_eps,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=F.silu,
            # Megatron fuses bias and activation with a compiled function: a gain on a GPU only.
            bias_activation_fusion=device_type() == "cuda",
            bias_dropout_fusion=device_type() == "cuda",
            add_bias_linear=False,
            add_qkv_bias=self.qkv_bias,
            qk_layernorm=self.qk_norm,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            # megamed.parallel.init draws layout-independent values; Megatron only marks what is sharded.
            perform_initialization=True,
            init_method=_leave_uninitialised,
            output_layer_init_method=_leave_uninitialised,
            embedding_init_method=_leave_uninitialised,
            persist_layer_norm=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            recompute_granularity="full" if self.recompute else None,
            recompute_method="uniform" if self.recompute else None,
            recompute_num_layers=1 if self.recompute else None,
            calculate_per_token_loss=False,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=_none_if_one(parallel.virtual_pipeline),
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            sequence_parallel=parallel.sequence and parallel.tensor > 1,
            deallocate_pipeline_outputs=True,
            batch_p2p_comm=device_type() == "cuda",
            overlap_p2p_comm=False,
        )
        values.update(self.moe.to_mcore(self.num_layers))
        values.update(overrides)
        return TransformerConfig(**values)


def _leave_uninitialised(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _none_if_one(size: int) -> int | None:
    return size if size > 1 else None


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise UserError(f"{small_name}={small} does not divide {large_name}={large}", everywhere=True)
