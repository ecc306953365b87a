"""FLOPs of one training step, counted analytically.

Counted are matrix products and attention; a multiplication with its addition is 2. Norms, activations,
softmax and other element-wise work are left out, as is usual (Chowdhery et al., 2022, arXiv:2204.02311,
appendix B). These are model FLOPs: what the mathematics asks for, whatever the kernels do. Causal attention
counts half, within each document alone, and neither activation recomputation nor a flash kernel's second look
at the scores adds anything. Model FLOPs over time and over the hardware's peak give the MFU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megamed.models.language import LanguageConfig
from megamed.models.projector import ProjectorConfig, tokens_per_frame
from megamed.models.vision import VisionConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of a part of the model in one step.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, all parameters trained.
    """

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward)


def _matmul(num_rows: int, in_features: int, out_features: int) -> int:
    return 2 * num_rows * in_features * out_features


def _attention(num_heads: int, head_dim: int, length: int) -> int:
    """Scores and weighted sum of values, every position looking at every position."""
    return 2 * _matmul(length, num_heads * head_dim, length)


def vision_flops(config: VisionConfig, num_frames: int, image_size: int | None = None) -> Flops:
    """FLOPs of the vision tower.

    Args:
        config: the tower.
        num_frames: frames in the step.
        image_size: side of the frames in pixels, `config.image_size` if None.
    """
    hidden_size = config.hidden_size
    num_patches = ((image_size or config.image_size) // config.patch_size) ** 2
    length = 1 + num_patches
    embedding = _matmul(num_patches, config.num_channels * config.patch_size**2, hidden_size)
    layer = (
        _matmul(length, hidden_size, 3 * hidden_size)
        + _attention(config.num_heads, hidden_size // config.num_heads, length)
        + _matmul(length, hidden_size, hidden_size)
        + 2 * _matmul(length, hidden_size, config.intermediate_size)
    )
    forward = num_frames * (embedding + config.num_layers_run * layer)
    # Pixels need no gradient: the embedding's backward is the weight's gradient alone.
    return Flops(forward, 2 * forward - num_frames * embedding)


def projector_flops(
    config: ProjectorConfig, num_frames: int, image_size: int = 448, patch_size: int = 14
) -> Flops:
    """FLOPs of the projector, its input's gradient included.

    Args:
        config: the projector.
        num_frames: frames in the step.
        image_size: side of the frames in pixels.
        patch_size: side of a patch in pixels.
    """
    num_tokens = num_frames * tokens_per_frame(image_size, patch_size, config.downsample_ratio)
    language_size = config.language_hidden_size
    forward = _matmul(num_tokens, config.input_size + language_size, language_size)
    return Flops(forward, 2 * forward)


def language_flops(
    document_lengths: Sequence[int],
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    swiglu: bool = True,
    num_experts: int = 0,
    top_k: int = 0,
    moe_intermediate_size: int = 0,
    shared_intermediate_size: int = 0,
    first_dense_layers: int = 0,
    num_labels: int | None = None,
    causal: bool = True,
) -> Flops:
    """FLOPs of a decoder-only language model, the output layer included.

    Args:
        document_lengths: tokens of each document, visual tokens included; attention stays within a document.
        hidden_size: width of the residual stream.
        num_layers: all transformer layers, dense and mixture-of-experts.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: size of a head.
        intermediate_size: inner width of a dense layer's MLP.
        vocab_size: rows of the output layer.
        swiglu: MLPs and experts are gated: three matrices instead of two.
        num_experts: experts of a mixture-of-experts layer; 0 for a dense model.
        top_k: experts that a token is sent to.
        moe_intermediate_size: inner width of an expert.
        shared_intermediate_size: inner width of the expert that sees every token; 0 for none.
        first_dense_layers: layers at the bottom that stay dense.
        num_labels: tokens with a loss, which alone need the output layer; None for all.
        causal: count causal attention at half of full attention (model FLOPs). False counts it in full, as
            kernels do that compute all scores and mask them.
    """
    num_tokens = sum(document_lengths)
    num_moe_layers = num_layers - first_dense_layers if num_experts else 0
    query_size, key_value_size = num_heads * head_dim, 2 * num_kv_heads * head_dim
    # In (q, k, v) and out (query_size to hidden_size) are products over the same pairs of sizes.
    projections = _matmul(num_tokens, hidden_size, 2 * query_size + key_value_size)
    attention = sum(_attention(num_heads, head_dim, length) for length in document_lengths)
    num_mlp_matrices = 3 if swiglu else 2
    dense = num_mlp_matrices * _matmul(num_tokens, hidden_size, intermediate_size)
    router = _matmul(num_tokens, hidden_size, num_experts)
    width_visited = top_k * moe_intermediate_size + shared_intermediate_size
    moe = router + num_mlp_matrices * _matmul(num_tokens, hidden_size, width_visited)
    forward = (
        num_layers * (projections + (attention // 2 if causal else attention))
        + (num_layers - num_moe_layers) * dense
        + num_moe_layers * moe
        + _matmul(num_tokens if num_labels is None else num_labels, hidden_size, vocab_size)
    )
    return Flops(forward, 2 * forward)


def flops_of_language(
    config: LanguageConfig, document_lengths: Sequence[int], num_labels: int | None = None, causal: bool = True
) -> Flops:
    """`language_flops` of a configured model; the other arguments are its own."""
    moe = config.moe
    return language_flops(
        document_lengths,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.kv_channels,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        num_experts=moe.total_experts,
        top_k=moe.top_k if moe.total_experts else 0,
        moe_intermediate_size=moe.intermediate_size,
        shared_intermediate_size=moe.shared_intermediate_size,
        first_dense_layers=moe.first_dense_layers,
        num_labels=num_labels,
        causal=causal,
    )
