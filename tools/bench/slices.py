"""A slice of a large model: its real widths, and as many layers as one device holds, with documents to train on.

Shapes: N frames, C channels, H and W pixels.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megamed import runtime, train
from megamed.config import compose, load
from megamed.data import Document, FrameRef, Microbatch, pack
from megamed.models.vlm import VLMConfig
from megamed.train import JobConfig
from megamed.utils import UserError

# bf16 weights 2, fp32 gradients 4, and the optimizer's fp32 weights and two moments 12.
BYTES_PER_PARAMETER = 18
# Left to activations, logits and the allocator.
ACTIVATION_SHARE = 0.3
TEXT_TOKENS = 256
ANSWER = 2


@dataclass(frozen=True)
class Slice:
    """A built slice and what it trains on."""

    job: train.Job
    microbatches: list[Microbatch]
    load_frames: Callable[[Sequence[FrameRef]], Tensor]
    transformer_engine: bool


def build_slice(conf: Path, args: argparse.Namespace) -> Slice:
    """Build the model, optimizer and data that the options ask for.

    Args:
        conf: the folder of configurations.
        args: the options of `train_step.py`.

    Raises:
        UserError: not a layer fits in memory, or a document does not fit in a row.
    """
    dtype = args.dtype if args.dtype != "auto" else "bf16" if runtime.device_type() == "cuda" else "fp32"
    overrides = [f"model={args.slice}", f"train.dtype={dtype}", f"train.microbatches={args.microbatches}",
                 f"data.seq_length={args.seq_length}", "optim.warmup_steps=0", *args.overrides]
    config = load(JobConfig, compose(conf, "pretrain", overrides))
    if args.tiny_widths:
        narrow(config.model)
    layers = args.layers or layers_that_fit(config.model)
    config.model.vision.num_layers = config.model.language.num_layers = layers
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    config.validate(1)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    job = train.build_job(config, mesh)
    microbatches = rows(config, job.model.vision.module.tokens_per_frame, args.frames)
    size = config.model.vision.image_size
    frames = torch.randn(config.model.frames_per_pass, 3, size, size)
    linear_qkv = job.model.language[0].module.decoder.layers[0].self_attention.linear_qkv
    return Slice(
        job,
        microbatches,
        # In host memory, as a data loader leaves them: the copy to the device is part of the step.
        load_frames=lambda refs: frames[: len(refs)],
        transformer_engine=type(linear_qkv).__module__.startswith("megatron.core.extensions"),
    )


def narrow(model: VLMConfig) -> None:
    """Same parts, small: for trying the benchmark where the real widths do not fit."""
    vision, language = model.vision, model.language
    vision.hidden_size, vision.num_heads, vision.intermediate_size, vision.image_size = 50, 5, 100, 56
    language.hidden_size, language.num_heads, language.num_kv_heads = 64, 4, 2
    language.intermediate_size, language.vocab_size = 128, 500
    model.projector.vision_hidden_size, model.projector.language_hidden_size = 50, 64


def layers_that_fit(model: VLMConfig) -> int:
    """Largest number of vision layers and of language layers, as many of each, whose training fits.

    Raises:
        UserError: none fits, or there is no GPU whose memory could be asked.
    """
    if runtime.device_type() == "cpu":
        raise UserError("a slice without --layers takes what fits in the GPU's memory; here, give --layers")
    vision, language = model.vision, model.language
    head_dim = language.kv_channels
    a_vision_layer = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    a_language_layer = language.hidden_size * (
        2 * (language.num_heads + language.num_kv_heads) * head_dim + 3 * language.intermediate_size
    )
    ends = (1 if language.tie_embeddings else 2) * language.padded_vocab_size * language.hidden_size
    ends += (model.projector.input_size + language.hidden_size) * language.hidden_size
    memory = torch.cuda.get_device_properties(0).total_memory
    room = memory * (1 - ACTIVATION_SHARE) / BYTES_PER_PARAMETER - ends
    layers = min(int(room / (a_vision_layer + a_language_layer)), vision.num_layers, language.num_layers)
    if layers < 1:
        raise UserError(f"not one layer of {model.name} can be trained in {memory / 2**30:.0f} GiB")
    return layers


def rows(config: JobConfig, tokens_per_frame: int, num_frames: int) -> list[Microbatch]:
    """Packed rows of documents with random text: frames, then text with a loss.

    Raises:
        UserError: a document does not fit.
    """
    seq_length = config.data.seq_length
    length = num_frames * tokens_per_frame + TEXT_TOKENS
    per_row = seq_length // length
    if per_row < 1:
        raise UserError(f"a document of {num_frames} frames has {length} tokens, more than --seq-length {seq_length}")
    generator = torch.Generator().manual_seed(config.train.seed)
    microbatches = []
    for _ in range(config.train.microbatches):
        documents = []
        for number in range(per_row):
            tokens = torch.randint(1, config.model.language.vocab_size, (length,), generator=generator).tolist()
            num_visual = num_frames * tokens_per_frame
            documents.append(
                Document(
                    sample_id=f"random-{number}",
                    tokens=tokens,
                    loss_kinds=[0] * num_visual + [ANSWER] * TEXT_TOKENS,
                    visual_positions=list(range(num_visual)),
                    frames=[FrameRef(number, num_frames, index) for index in range(num_frames)],
                )
            )
        microbatches.append(pack(documents, seq_length, pad_id=0))
    return microbatches
