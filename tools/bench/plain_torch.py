"""The other side of the comparison: the same model as a plain PyTorch user trains it, with transformers.

`InternVLForConditionalGeneration` with a Qwen3 text model and scaled-dot-product attention, the fused
`torch.optim.AdamW`, `clip_grad_norm_`, and gradient accumulation where a step has several rows.

Shapes: B documents of a batch, L tokens of the longest, S tokens of a packed row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamed.data import FrameRef, Microbatch
from megamed.models.language import hf as language_hf
from megamed.models.projector import hf as projector_hf
from megamed.models.vision import hf as vision_hf
from megamed.models.vlm import VLMConfig
from megamed.optim import OptimConfig
from megamed.parallel import PlacedModel
from megamed.utils import UserError

IGNORE = -100
LAYOUTS = ("padded rows", "padded step", "packed rows")
"""How the documents of a step become batches: those of each packed row padded to the longest one, gradients
accumulated over rows; those of the whole step in one padded batch; or the packed rows themselves, with
positions that restart in each document, from which transformers makes a block-diagonal mask."""


def build_model(config: VLMConfig, image_token_id: int) -> nn.Module:
    """The same model in transformers, its weights drawn by transformers.

    Raises:
        UserError: the language model is not a Qwen3, or its RoPE is stretched.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen3Config

    vision, language = config.vision, config.language
    if not language.qk_norm or language.moe.num_experts or language.rotary.scaling != "none":
        raise UserError(
            "the comparison is made for a dense model with model.language.qk_norm=true (Qwen3) and "
            "model.language.rotary.scaling=none"
        )
    theirs = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            intermediate_size=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            norm_type=vision.norm,
            layer_norm_eps=vision.norm_eps,
            use_mean_pooling=not vision.final_norm,
        ),
        text_config=Qwen3Config(
            vocab_size=language.vocab_size,
            hidden_size=language.hidden_size,
            intermediate_size=language.intermediate_size,
            num_hidden_layers=language.num_layers,
            num_attention_heads=language.num_heads,
            num_key_value_heads=language.num_kv_heads,
            head_dim=language.kv_channels,
            rms_norm_eps=language.norm_eps,
            max_position_embeddings=language.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": language.rotary.base},
            tie_word_embeddings=language.tie_embeddings,
            use_cache=False,
        ),
        image_token_id=image_token_id,
        downsample_ratio=config.projector.downsample_ratio,
        tie_word_embeddings=language.tie_embeddings,
    )
    theirs._attn_implementation = "sdpa"
    return InternVLForConditionalGeneration(theirs).train()


def copy_weights(model: PlacedModel, config: VLMConfig, theirs: nn.Module) -> None:
    """Give the transformers model megamed's weights; one process holds all of them."""
    encoder = model.vision.module
    language = language_hf.to_hf(model.language[0].module.state_dict(), config.language, "qwen3")
    parts = {
        "model.vision_tower.": vision_hf.to_hf(encoder.vision_tower.state_dict()),
        "model.multi_modal_projector.": projector_hf.to_hf(encoder.projector.state_dict()),
        "": {
            name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
            for name, tensor in language.items()
        },
    }
    state = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.language.tie_embeddings else set()
    assert set(missing) <= tied and not unexpected, (missing, unexpected)


@dataclass(frozen=True)
class Batch:
    """What the model is called with, and the token after each position, `IGNORE` where it has no loss."""

    inputs: dict[str, Tensor]
    labels_BL: Tensor
    frames: list[FrameRef]


def batches(microbatches: Sequence[Microbatch], layout: str, kinds: Sequence[int], device: torch.device) -> list[Batch]:
    """The documents of a step as one of `LAYOUTS`.

    Args:
        microbatches: megamed's packed rows.
        layout: one of `LAYOUTS`.
        kinds: which kinds of labels count, as indices into `LOSS_KINDS`.
        device: where the tensors go.
    """
    groups = [list(microbatches)] if layout == "padded step" else [[m] for m in microbatches]
    made = []
    for group in groups:
        if layout == "packed rows":
            inputs, labels = _row(group[0], kinds)
        else:
            inputs, labels = _padded([d for m in group for d in _documents(m, kinds)])
        on_device = {name: tensor.to(device) for name, tensor in inputs.items()}
        made.append(Batch(on_device, labels.to(device), [f for m in group for f in m.frames]))
    return made


def _labels(row: Microbatch, kinds: Sequence[int]) -> Tensor:
    counts = torch.isin(row.loss_kind_S, torch.tensor(kinds, dtype=row.loss_kind_S.dtype))
    return torch.where(counts, row.labels_S, IGNORE)


def _documents(row: Microbatch, kinds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    bounds = [bound for bound in row.cu_seqlens.tolist() if bound <= row.num_real]
    labels = _labels(row, kinds)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        yield row.tokens_S[start:end], labels[start:end]


def _row(row: Microbatch, kinds: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    real = slice(0, row.num_real)
    inputs = {"input_ids": row.tokens_S[None, real], "position_ids": row.position_S[None, real]}
    return inputs, _labels(row, kinds)[None, real]


def _padded(documents: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    tokens, labels = [list(part) for part in zip(*documents, strict=True)]
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(t) for t in tokens], batch_first=True)
    inputs = {"input_ids": pad(tokens, batch_first=True), "attention_mask": mask}
    return inputs, pad(labels, batch_first=True, padding_value=IGNORE)


class PlainTrainer:
    """Trains the transformers model.

    Args:
        model: from `build_model`.
        config: the optimizer's settings, the same as megamed's.
        load: frames of some references, [N, C, H, W].
        dtype: bf16 computes under autocast over fp32 weights; fp32 as it is.
    """

    def __init__(
        self, model: Any, config: OptimConfig, load: Callable[[Sequence[FrameRef]], Tensor], dtype: torch.dtype
    ):
        self.model, self.config, self.load, self.dtype = model, config, load, dtype
        self.device = next(model.parameters()).device
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the losses of a batch."""
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()
        with autocast:
            pixels = self.load(batch.frames).to(self.device) if batch.frames else None
            logits = self.model(**batch.inputs, pixel_values=pixels, use_cache=False).logits
        return F.cross_entropy(
            logits.flatten(0, 1).float(), batch.labels_BL.flatten(), ignore_index=IGNORE, reduction="sum"
        )

    def step(self, step_batches: Sequence[Batch], num_labels: int) -> float:
        """One training step; the mean loss over `num_labels` labels."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for batch in step_batches:
            loss = self.loss(batch) / num_labels
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        return float(total)
