"""What a training step takes at a layout, counted: FLOPs, bytes on a rank, bytes over links, and the seconds they cost.

Nothing here is measured. Memory is counted tensor by tensor as megamed's code allocates them, every layer of the
language model recomputed. Time is FLOPs over a fraction of the peak and bytes over links, as a `Machine` says them;
ring transfers hide behind the blocks of attention, nothing else hides. docs/long_context.md has the formulas.

A rank's tokens are those of its context rank unless a name says otherwise; a "row" is its part of the residual
stream, one tensor-parallel rank's, in bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from megamed.models.flops import flops_of_language, projector_flops, vision_flops
from megamed.models.language import LanguageConfig
from megamed.models.projector import tokens_per_frame
from megamed.models.vision import VisionConfig
from megamed.models.vlm import FrameEncoder, VLMConfig
from megamed.ops.cross_entropy import LOGITS_BYTES
from megamed.ops.traffic import Traffic, ring_traffic, ulysses_traffic
from megamed.ops.ulysses import kv_copies
from megamed.runtime import ParallelConfig
from megamed.utils import UserError

BF16, FP32 = 2, 4
# Bytes of a parameter: bf16 weight and fp32 gradient on the rank itself; fp32 copy and Adam's two moments, sharded.
HELD, SHARDED = BF16 + FP32, 3 * FP32
# In forward passes of a layer. Backward: two products for each one of the forward pass; attention's kernel makes
# the scores again, five products for the forward pass's two. And the recomputed forward pass.
PRODUCT_PASSES, ATTENTION_PASSES, ATTENTION_BACKWARD = 4.0, 4.5, 2.5
# Bytes that merging one block into the output reads and writes of memory for each entry of the queries: the block's
# bf16 copied to fp32, the output read, read and written; and adding one block's bf16 dq, or dk and dv, to fp32 sums.
MERGE_OUTPUT, ADD_GRADIENT = 18, 10
# Of one tensor-parallel pair of linear layers, with sequence parallelism: gather and scatter in the forward pass, in
# the recomputed one and in the backward pass, which also gathers the input again.
TENSOR_COLLECTIVES = 7
# An expert layer's dispatch and combine, forward, recomputed and backward.
EXPERT_EXCHANGES = 6


@dataclass(frozen=True)
class Machine:
    """GPUs and their links: facts of the data sheets (docs/long_context.md names them), then assumptions."""

    memory: float = 141e9
    """Bytes of a GPU."""
    peak: float = 989e12
    """FLOP/s, bf16, dense."""
    memory_bandwidth: float = 4.8e12
    """Bytes a second between a GPU and its memory."""
    nvlink: float = 450e9
    """Bytes a second that a GPU sends within its node."""
    infiniband: float = 50e9
    """Bytes a second that a GPU sends to another node."""
    gpus_per_node: int = 8
    reserved: float = 8e9
    """Bytes that the CUDA context, NCCL, cuBLAS and fragmentation take. Assumed."""
    products: float = 0.6
    """Fraction of the peak that the language model's matrix products reach. Assumed."""
    attention: float = 0.5
    """Fraction of the peak that a block of attention reaches. Assumed."""
    encoder: float = 0.5
    """Fraction of the peak that the frame encoder reaches. Assumed."""
    links: float = 0.8
    """Fraction of a link's bandwidth that transfers reach, and of the memory's that merging reaches. Assumed."""

    def bandwidth(self, span: int) -> float:
        """Bytes a second that a rank sends in a group whose ranks, from first to last, span so many GPUs."""
        within_node = span <= self.gpus_per_node and self.gpus_per_node % span == 0
        return self.links * (self.nvlink if within_node else self.infiniband)


@dataclass(frozen=True)
class Layout:
    """How one replica is laid out. parallel.context = ring x ulysses, parallel.data = 1."""

    parallel: ParallelConfig
    ring: int
    ulysses: int

    @property
    def num_ranks(self) -> int:
        """All ranks: there is one replica."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context

    @property
    def name(self) -> str:
        """As it stands in a table."""
        p = self.parallel
        experts = f", expert {p.expert} x {p.expert_tensor}" if p.expert * p.expert_tensor > 1 else ""
        return f"{p.tensor} | {p.pipeline} | {p.context} = {self.ring} x {self.ulysses}{experts}"


@dataclass(frozen=True)
class Task:
    """One training step.

    Attributes:
        model: the model; its layers are recomputed, whatever it says.
        tokens: of each document, a packed row of its own. As many as fit are whole frames, the rest is text.
        documents: of the step; each is one microbatch.
    """

    model: VLMConfig
    tokens: int
    documents: int = 1

    @property
    def frame_tokens(self) -> int:
        """Visual tokens of a frame."""
        vision = self.model.vision
        return tokens_per_frame(vision.image_size, vision.patch_size, self.model.projector.downsample_ratio)

    @property
    def num_frames(self) -> int:
        """Frames of a document."""
        return self.tokens // self.frame_tokens


@dataclass(frozen=True)
class Work:
    """FLOPs of one document.

    Attributes:
        attention: forward, of the language model's causal attention.
        products: forward, of its matrix products, the output layer included.
        encoder: forward, of vision tower and projector.
        model: model FLOPs of everything, forward and backward, as MFU counts them.
    """

    attention: int
    products: int
    encoder: int
    model: int


@dataclass(frozen=True)
class Plan:
    """A layout with its bytes, on the fullest rank, and its seconds, by what they go to."""

    layout: Layout
    memory: dict[str, float]
    seconds: dict[str, float]

    @property
    def total_memory(self) -> float:
        return sum(self.memory.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def fits(self, machine: Machine) -> bool:
        """Whether the GPU's memory has room for it."""
        return self.total_memory <= machine.memory - machine.reserved


def count_work(task: Task) -> Work:
    """FLOPs of one document."""
    vision = task.model.vision
    causal, full = (flops_of_language(task.model.language, [task.tokens], causal=causal) for causal in (True, False))
    attention = full.forward - causal.forward  # the half that a causal kernel skips is as large as the one it does
    encoder = vision_flops(vision, task.num_frames) + projector_flops(
        task.model.projector, task.num_frames, vision.image_size, vision.patch_size
    )
    return Work(attention, causal.forward - attention, encoder.forward, causal.total + encoder.total)


def layouts(task: Task, gpus: int) -> Iterator[Layout]:
    """Every layout of one replica over so many GPUs that the model's and the attention's own rules allow."""
    language = task.model.language
    for tensor, pipeline in product(_divisors(gpus), repeat=2):
        context = gpus // (tensor * pipeline)
        if tensor * pipeline * context != gpus or task.tokens % (context * tensor):
            continue
        tensors = sorted({1, tensor}) if language.moe.total_experts else [1]
        for expert, expert_tensor in product(_divisors(max(language.moe.total_experts, 1)), tensors):
            parallel = ParallelConfig(
                tensor=tensor,
                pipeline=pipeline,
                context=context,
                expert=expert,
                expert_tensor=expert_tensor,
                data=1,
                sequence=tensor > 1,
            )
            for ulysses in _divisors(context):
                if _is_valid(language, parallel, gpus, ulysses):
                    yield Layout(parallel, context // ulysses, ulysses)


def _is_valid(language: LanguageConfig, parallel: ParallelConfig, gpus: int, ulysses: int) -> bool:
    try:
        parallel.data_size(gpus)
        language.validate(parallel)
        kv_copies(language.num_heads // parallel.tensor, language.num_kv_heads // parallel.tensor, ulysses)
    except UserError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def rank_parameters(language: LanguageConfig, parallel: ParallelConfig, stage: int) -> tuple[int, int]:
    """Parameters of the language model on one rank: of experts that are spread over ranks, and all others.

    Args:
        language: the model.
        parallel: the layout.
        stage: index of the pipeline stage.

    Returns:
        (others, experts).
    """
    hidden, heads, groups, width = (
        language.hidden_size, language.num_heads, language.num_kv_heads, language.kv_channels
    )  # fmt: skip
    moe, tensor, num_layers = language.moe, parallel.tensor, language.num_layers // parallel.pipeline
    rows = (heads + 2 * groups) * width
    attention = (hidden * rows + (rows if language.qkv_bias else 0) + heads * width * hidden) // tensor
    layer = attention + 2 * hidden + (2 * width if language.qk_norm else 0)
    num_dense = _num_dense_layers(language, parallel, stage)
    num_moe = num_layers - num_dense
    others = num_layers * layer + num_dense * 3 * hidden * language.intermediate_size // tensor
    others += num_moe * (hidden * moe.total_experts + 3 * hidden * moe.shared_intermediate_size // tensor)
    expert = 3 * hidden * moe.intermediate_size // parallel.expert_tensor
    experts = num_moe * moe.total_experts // parallel.expert * expert
    vocabulary = language.padded_vocab_size // tensor * hidden
    first, last = stage == 0, stage == parallel.pipeline - 1
    others += vocabulary * (first + (last and not (first and language.tie_embeddings))) + (hidden if last else 0)
    return others, experts


def encoder_parameters(model: VLMConfig) -> int:
    """Parameters of vision tower and projector, which every rank holds."""
    with torch.device("meta"):
        return sum(p.numel() for p in FrameEncoder(model.vision, model.projector).parameters())


def _num_dense_layers(language: LanguageConfig, parallel: ParallelConfig, stage: int) -> int:
    """Layers of a stage whose MLP is dense."""
    num_layers = language.num_layers // parallel.pipeline
    if not language.moe.total_experts:
        return num_layers
    return min(max(language.moe.first_dense_layers - stage * num_layers, 0), num_layers)


def rank_memory(task: Task, layout: Layout, stage: int, num_encoder: int) -> dict[str, float]:
    """Most bytes on a rank of one pipeline stage, by what they hold.

    Args:
        task, layout: what is trained, and where.
        stage: index of the pipeline stage.
        num_encoder: parameters of the frame encoder.
    """
    language, parallel = task.model.language, layout.parallel
    others, experts = rank_parameters(language, parallel, stage)
    expert_shards = parallel.tensor * parallel.context // (parallel.expert * parallel.expert_tensor)
    row = task.tokens // (parallel.context * parallel.tensor) * language.hidden_size * BF16
    in_flight = min(parallel.pipeline - stage, task.documents)
    first, last = stage == 0, stage == parallel.pipeline - 1
    frames = -(-task.num_frames * task.documents // layout.num_ranks)
    visual = task.num_frames * task.frame_tokens / task.tokens
    of_frame, of_pass = frame_memory(task.model.vision)
    working = max(
        layer_memory(language, layout, task.tokens),
        head_memory(language, parallel.tensor) if last else 0,
        min(frames, task.model.frames_per_pass) * of_pass,
    )
    kept = frames if task.model.frames_in_flight is None else min(frames, task.model.frames_in_flight)
    return {
        "language model: weights, fp32 gradients": HELD * (others + experts),
        "language model: optimizer": SHARDED * (others / parallel.context + experts / expert_shards),
        "encoder: weights, fp32 gradients": HELD * num_encoder,
        "encoder: optimizer": SHARDED * num_encoder / layout.num_ranks,
        "inputs of the layers": language.num_layers // parallel.pipeline * in_flight * row,
        "visual tokens and their gradients": 2 * task.documents * visual * row if first else 0,
        "frames' activations": kept * of_frame,
        "one layer, one pass or the head": working,
    }


def layer_memory(language: LanguageConfig, layout: Layout, tokens: int) -> float:
    """Most bytes that one layer takes beside its input, from its recomputed forward pass to its backward pass.

    That is either in the backward pass of its MLP, when all that the layer keeps is there, or of its attention.
    """
    tensor, width = layout.parallel.tensor, language.kv_channels
    heads, kv_heads = language.num_heads // tensor, language.num_kv_heads // tensor
    rank_tokens, copies = tokens // layout.parallel.context, kv_copies(heads, kv_heads, layout.ulysses)
    row = rank_tokens // tensor * language.hidden_size * BF16
    # Behind the all-to-all of Ulysses: more tokens, fewer heads, and as many bytes.
    q, kv = rank_tokens * heads * width * BF16, 2 * rank_tokens * kv_heads * width * BF16
    # RoPE's cosines and sines, of all layers; two norms' outputs and the residual stream between them; q, k, v as
    # projected and as attended; attention's output, before and behind the all-to-all, and the sums of its scores.
    kept = 2 * rank_tokens * width * BF16 + 3 * row + (q + kv) + (q + kv * copies)
    kept += q * (2 if layout.ulysses > 1 else 1) + rank_tokens * heads * FP32
    # What comes back, dq, dk and dv; an fp32 sum of dq and dk, dv for every query head within flash-attn's kernel.
    attention = 2 * q + kv * copies + 4 * q
    if layout.ring > 1:
        # The fp32 sum of dq; two ranks' keys and values in bf16; in fp32 the gradients of its own and of two others'.
        attention += 2 * q + 2 * kv * copies + 3 * 2 * kv * copies
    return kept + 2 * row + max(attention, mlp_memory(language, layout, rank_tokens))


def mlp_memory(language: LanguageConfig, layout: Layout, rank_tokens: int) -> float:
    """Bytes of an MLP's backward pass: gate and up, activation, and the same of their gradients.

    The larger one of dense layer and expert layer; the latter's tokens evenly spread over its experts.
    """
    moe, tensor, expert_tensor = language.moe, layout.parallel.tensor, layout.parallel.expert_tensor
    # With sequence parallelism, whole rows of input, output's gradient and input's gradient for a moment.
    whole = 3 * rank_tokens * language.hidden_size * BF16 if tensor > 1 else 0
    dense = whole + 6 * rank_tokens * language.intermediate_size // tensor * BF16
    if not moe.total_experts:
        return dense
    sent = rank_tokens // tensor * moe.top_k
    # An expert's input and output, and their gradients, are whole rows on all ranks that share the expert.
    routed = 4 * sent * expert_tensor * language.hidden_size * BF16 + 6 * sent * moe.intermediate_size * BF16
    shared = whole + 6 * rank_tokens * moe.shared_intermediate_size // tensor * BF16
    return max(dense if moe.first_dense_layers else 0, routed + (shared if moe.shared_intermediate_size else 0))


def head_memory(language: LanguageConfig, tensor: int) -> float:
    """Bytes of the output layer and its loss: a chunk of logits, and the weight's gradient in fp32 and bf16."""
    return 1.5 * LOGITS_BYTES + (FP32 + BF16) * language.padded_vocab_size // tensor * language.hidden_size


def frame_memory(vision: VisionConfig) -> tuple[int, int]:
    """Bytes of a frame's activations between the encoder's two passes, and of one layer's with their gradients."""
    length = 1 + (vision.image_size // vision.patch_size) ** 2
    # q, k, v, their norms, both norms, both branches, attention's output, the residual stream; MLP.
    layer = length * ((11 if vision.qk_norm else 9) * vision.hidden_size + 2 * vision.intermediate_size) * BF16
    return vision.num_layers_run * (length * vision.hidden_size * BF16 if vision.recompute else layer), 2 * layer


def step_seconds(task: Task, work: Work, layout: Layout, machine: Machine, num_encoder: int) -> dict[str, float]:
    """Seconds of a step on one rank, by what they go to. Layers and output layer count as even over the stages."""
    language, parallel = task.model.language, layout.parallel
    share = task.documents / layout.num_ranks
    seconds = {
        "attention": ATTENTION_PASSES * work.attention * share / (machine.peak * machine.attention),
        "matrix products": PRODUCT_PASSES * work.products * share / (machine.peak * machine.products),
    }
    rank_layers = task.documents * language.num_layers / parallel.pipeline
    for name, of_layer in layer_transfers(task, work, layout, machine).items():
        seconds[name] = rank_layers * of_layer
    seconds["pipeline bubble"] = (parallel.pipeline - 1) / task.documents * sum(seconds.values())

    frames = -(-task.num_frames * task.documents // layout.num_ranks)
    limit = task.model.frames_in_flight
    again = 0.0 if limit is None or not frames else max(frames - limit, 0) / frames
    passes = 3 + task.model.vision.recompute + again
    of_frame = work.encoder / max(task.num_frames, 1)
    seconds["encoder"] = passes * of_frame * frames / (machine.peak * machine.encoder)

    others, experts = rank_parameters(language, parallel, 0)
    everywhere, within_stage = (machine.bandwidth(n) for n in (layout.num_ranks, parallel.tensor * parallel.context))
    visual = 2 * frames * task.frame_tokens * language.hidden_size * BF16
    encoder = HELD * num_encoder * (layout.num_ranks - 1) / layout.num_ranks
    shards = parallel.tensor * parallel.context // (parallel.expert * parallel.expert_tensor)
    model = HELD * (others * (parallel.context - 1) / parallel.context + experts * (shards - 1) / shards)
    # fp32 gradients to the ranks that own their part of the optimizer, bf16 weights back.
    seconds["gradients, weights, visual tokens"] = (visual + encoder) / everywhere + model / within_stage
    return seconds


def layer_transfers(task: Task, work: Work, layout: Layout, machine: Machine) -> dict[str, float]:
    """Seconds that a layer's transfers add to its computing, forward, recomputed and backward.

    Merging counts for the last rank of the ring, whose queries all take part in every block; the others wait for it.
    """
    language, moe, parallel = task.model.language, task.model.language.moe, layout.parallel
    tensor, rank_tokens = parallel.tensor, task.tokens // parallel.context
    ring, ulysses = attention_traffic(language, layout, task.tokens)
    steps = layout.ring - 1
    block = work.attention / language.num_layers / (tensor * parallel.context * layout.ring)
    block /= machine.peak * machine.attention
    ring_link = machine.bandwidth(tensor * parallel.context)
    row = rank_tokens // tensor * language.hidden_size * BF16
    # A gather or scatter sends each rank's part of the row to the others.
    num_dense = language.num_layers - (language.num_layers - moe.first_dense_layers if moe.total_experts else 0)
    dense = num_dense / language.num_layers
    pairs = 1 + dense + (1 - dense if moe.shared_intermediate_size else 0)
    expert, expert_tensor = parallel.expert, parallel.expert_tensor
    sent = moe.top_k * row * ((expert - 1) / expert + expert_tensor - 1)
    entries = rank_tokens * language.kv_channels // tensor
    queries, keys = entries * language.num_heads, 2 * entries * language.num_kv_heads
    merged = 2 * MERGE_OUTPUT * queries + ADD_GRADIENT * (queries + keys)
    return {
        "merging the ring's blocks": steps * merged / (machine.memory_bandwidth * machine.links),
        "ring, not hidden": 2 * max(ring.forward / ring_link - steps * block, 0)
        + max(ring.backward / ring_link - steps * ATTENTION_BACKWARD * block, 0),
        "Ulysses": (2 * ulysses.forward + ulysses.backward) / machine.bandwidth(tensor * layout.ulysses),
        "tensor parallel": TENSOR_COLLECTIVES * pairs * (tensor - 1) * row / machine.bandwidth(tensor),
        "expert parallel": EXPERT_EXCHANGES * (1 - dense) * sent / machine.bandwidth(expert * expert_tensor),
    }


def attention_traffic(language: LanguageConfig, layout: Layout, tokens: int) -> tuple[Traffic, Traffic]:
    """Bytes that a rank sends in one layer's attention: in the ring, and in the all-to-alls of Ulysses."""
    parallel, width = layout.parallel, language.kv_channels
    heads, kv_heads = language.num_heads // parallel.tensor, language.num_kv_heads // parallel.tensor
    rank_tokens = tokens // parallel.context
    ulysses = ulysses_traffic(rank_tokens, heads, kv_heads, width, BF16, layout.ulysses)
    kv_heads = kv_heads * kv_copies(heads, kv_heads, layout.ulysses) // layout.ulysses
    return ring_traffic(rank_tokens * layout.ulysses, kv_heads, width, BF16, layout.ring), ulysses


def fullest_rank(task: Task, layout: Layout, num_encoder: int) -> dict[str, float]:
    """Memory of the rank that needs most: the first stage has most microbatches in flight, the last the head."""
    ends = {0, layout.parallel.pipeline - 1}
    return max((rank_memory(task, layout, stage, num_encoder) for stage in ends), key=lambda parts: sum(parts.values()))


def context_splits(task: Task, context: int, machine: Machine) -> dict[tuple[int, int], tuple[float, ...]]:
    """The attention of one document over context ranks alone, by every (ring, ulysses), pure ring first.

    Returns:
        Bytes that a rank sends in the ring and in all-to-alls, forward, recomputed and backward; seconds that the
        links take; seconds of these that nothing hides; seconds that merging takes.
    """
    work, num_layers = count_work(task), task.model.language.num_layers
    found: dict[tuple[int, int], tuple[float, ...]] = {}
    for layout in layouts(task, context):
        if layout.parallel.context == context and layout.parallel.expert * layout.parallel.expert_tensor == 1:
            sent = attention_traffic(task.model.language, layout, task.tokens)
            ring, ulysses = (num_layers * (2 * x.forward + x.backward) for x in sent)
            links = ring / machine.bandwidth(context) + ulysses / machine.bandwidth(layout.ulysses)
            added = layer_transfers(task, work, layout, machine)
            waited = num_layers * (added["ring, not hidden"] + added["Ulysses"])
            merging = num_layers * added["merging the ring's blocks"]
            found[layout.ring, layout.ulysses] = (ring, ulysses, links, waited, merging)
    return found


def plans(task: Task, gpus: int, machine: Machine) -> list[Plan]:
    """All layouts on so many GPUs: those that fit, the fastest first, then the others, the smallest first.

    Raises:
        UserError: there is no layout.
    """
    work, num_encoder = count_work(task), encoder_parameters(task.model)
    found = [
        Plan(layout, fullest_rank(task, layout, num_encoder), step_seconds(task, work, layout, machine, num_encoder))
        for layout in layouts(task, gpus)
    ]
    if not found:
        raise UserError(
            f"no layout on {gpus} GPUs splits documents of {task.tokens} tokens: context x tensor must divide them, "
            "pipeline the layers, tensor the key/value heads; choose another number of GPUs or of tokens"
        )
    return sorted(found, key=lambda plan: (0, plan.total_seconds) if plan.fits(machine) else (1, plan.total_memory))


def largest_document(task: Task, gpus: int, machine: Machine) -> int:
    """Most tokens of a document, up to the task's, that some layout has room for; 0 for none."""
    num_encoder, unit = encoder_parameters(task.model), math.lcm(task.frame_tokens, gpus)

    def fits(units: int) -> bool:
        smaller = replace(task, tokens=units * unit)
        room = machine.memory - machine.reserved
        return any(
            sum(fullest_rank(smaller, layout, num_encoder).values()) <= room for layout in layouts(smaller, gpus)
        )

    low, high = 0, task.tokens // unit
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * unit
