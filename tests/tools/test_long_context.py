"""The calculator of layouts: against numbers counted by hand, the real model's parameters, and a trace of a layer."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamed import runtime
from megamed.config import compose, load
from megamed.models.language import AttentionConfig, LanguageConfig, Packing, build_language_chunks
from megamed.models.moe import MoEConfig
from megamed.models.projector import ProjectorConfig
from megamed.models.vision import VisionConfig
from megamed.models.vlm import VLMConfig
from megamed.ops.zigzag import shard_order
from megamed.parallel.init import init_language
from megamed.runtime import ParallelConfig
from megamed.testing.ranks import RankPool
from megamed.train import JobConfig
from megamed.utils import UserError
from tools import layout_costs as costs

ROOT = Path(__file__).resolve().parents[2]
# Rates at which the hand-made numbers below are whole.
MACHINE = costs.Machine(
    peak=1.0, memory_bandwidth=1.0, nvlink=1.0, infiniband=0.5, products=1.0, attention=1.0, encoder=1.0, links=1.0
)


def language(**changed: Any) -> LanguageConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=250, hidden_size=32, num_layers=4, num_heads=8, num_kv_heads=4, intermediate_size=48, recompute=True
    )
    return LanguageConfig(**{**sizes, **changed})


def model(**changed: Any) -> VLMConfig:
    """A tiny VLM; its frames are 4 tokens."""
    vision = VisionConfig(
        hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, image_size=56, qk_norm=False, recompute=True
    )
    projector = ProjectorConfig(vision_hidden_size=16, language_hidden_size=32)
    return VLMConfig("tiny", vision, projector, language(**changed), frames_per_pass=2, frames_in_flight=4)


def layout(tensor: int = 1, pipeline: int = 1, ring: int = 1, ulysses: int = 1, expert: int = 1) -> costs.Layout:
    parallel = ParallelConfig(
        tensor=tensor,
        pipeline=pipeline,
        context=ring * ulysses,
        expert=expert,
        expert_tensor=tensor if expert > 1 else 1,
        data=1,
        sequence=tensor > 1,
    )
    return costs.Layout(parallel, ring, ulysses)


def count_real(rank: int, config: LanguageConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Parameters of the real model on one rank, on the meta device: all but experts, and experts."""
    dist.destroy_process_group()  # the one of the test's real ranks
    world_size = parallel.tensor * parallel.pipeline * parallel.context
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    mesh = runtime.build_mesh(parallel)
    runtime.seed_everything(1, mesh.data_rank)
    with runtime.meta_device():
        (chunk,) = build_language_chunks(config, AttentionConfig(), mesh, torch.bfloat16)
    sizes = {name: p.numel() for name, p in chunk.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".local_experts." in name)
    return sum(sizes.values()) - experts, experts


MIXED = MoEConfig(num_experts=4, top_k=2, intermediate_size=40, shared_intermediate_size=24, first_dense_layers=1)
CASES: dict[str, tuple[LanguageConfig, costs.Layout]] = {
    "dense": (language(), layout()),
    "all kinds of weights": (language(qkv_bias=True, qk_norm=True, head_dim=16), layout(tensor=2, pipeline=2)),
    "tied, one stage": (language(tie_embeddings=True), layout(tensor=4, ring=2)),
    "tied, two stages": (language(tie_embeddings=True), layout(pipeline=2)),
    "experts": (language(moe=MIXED), layout(tensor=2, pipeline=2, ring=2, expert=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_the_real_models(name: str, ranks: RankPool) -> None:
    config, where = CASES[name]
    num_stages = where.parallel.pipeline
    for stage in {0, num_stages - 1}:
        rank = stage * where.num_ranks // num_stages
        real = ranks.run(count_real, 1, rank, config, where.parallel)[0]
        assert costs.rank_parameters(config, where.parallel, stage) == real


def test_flops_of_a_document() -> None:
    work = costs.count_work(costs.Task(model(), tokens=40))
    # 4 layers; two products of 40 x 40 x 32, of which causal attention needs half.
    assert work.attention == 4 * (2 * 2 * 40 * 40 * 32) // 2
    layer = 32 * (8 + 4 + 4) * 4 + 32 * 32 + 3 * 32 * 48
    assert work.products == 2 * 40 * (4 * layer + 32 * 250)
    # 10 frames of 16 patches and a class token; patches of 3 x 14 x 14; then 4 tokens of 64, projected twice.
    tower = 2 * 16 * (3 * 14 * 14) * 16 + 3 * 2 * 17 * (4 * 16 * 16 + 2 * 16 * 24 + 2 * 17 * 16)
    assert work.encoder == 10 * (tower + 2 * 4 * (64 * 32 + 32 * 32))
    # Backward is twice forward, but for pixels, which need no gradient.
    assert work.model == 3 * (work.attention + work.products + work.encoder) - 10 * 2 * 16 * (3 * 14 * 14) * 16


def test_memory_by_hand() -> None:
    # 96 tokens, 24 frames, over 2 x 2 x 4 ranks, three documents: a rank has 12 tokens' rows of 32 in bf16, and 2
    # stages of 2 layers. The first has two documents in flight, the last one.
    task, where = costs.Task(model(), tokens=96, documents=3), layout(tensor=2, pipeline=2, ring=2, ulysses=2)
    first, last = (costs.rank_memory(task, where, stage, 1000) for stage in (0, 1))
    others, experts = costs.rank_parameters(task.model.language, where.parallel, 0)
    assert experts == 0
    assert first["language model: weights, fp32 gradients"] == (2 + 4) * others
    assert first["language model: optimizer"] == 12 * others / 4
    assert first["encoder: weights, fp32 gradients"] == 6 * 1000
    assert first["encoder: optimizer"] == 12 * 1000 / 16
    assert first["inputs of the layers"] == 2 * 2 * 12 * 32 * 2
    assert last["inputs of the layers"] == 1 * 2 * 12 * 32 * 2
    # All tokens are visual: rows and gradients of three documents, on the first stage.
    assert first["visual tokens and their gradients"] == 2 * 3 * 12 * 32 * 2
    assert last["visual tokens and their gradients"] == 0
    # Of 72 frames a rank encodes 5 and keeps 4; inputs of 3 layers, 17 x 16 in bf16.
    assert first["frames' activations"] == 4 * 3 * 17 * 16 * 2
    assert last["one layer, one pass or the head"] == costs.head_memory(task.model.language, 2)
    assert costs.fullest_rank(task, where, 1000) == last  # whose head outweighs all in so small a model


def test_memory_of_an_mlp_by_hand() -> None:
    # Gate, up and activation, and their gradients, of 64 tokens; 2 ranks have half of each and three whole rows.
    assert costs.mlp_memory(language(), layout(), 64) == 6 * 64 * 48 * 2
    assert costs.mlp_memory(language(), layout(tensor=2), 64) == 6 * 64 * 24 * 2 + 3 * 64 * 32 * 2
    # Experts: each of 32 tokens a rank goes to two experts, which two ranks share.
    moe = language(moe=replace(MIXED, shared_intermediate_size=0, first_dense_layers=0))
    routed = 4 * 64 * 2 * 32 * 2 + 6 * 64 * 40 * 2
    assert costs.mlp_memory(moe, layout(tensor=2, ring=2, expert=2), 64) == routed


class Allocations(TorchDispatchMode):
    """The most bytes that tensors held at one time, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def traced_peak(config: LanguageConfig, ring: int, num_tokens: int) -> int:
    """Bytes that forward and backward pass of a document take at their peak, beside the parameters."""
    runtime.destroy_mesh()
    mesh = runtime.build_mesh(ParallelConfig(context=ring))
    runtime.seed_everything(1, 0)
    attention = AttentionConfig(ring=ring, ulysses=1)
    (chunk,) = build_language_chunks(config, attention, mesh, torch.bfloat16)
    init_language([chunk], 1, 0.02, config.num_layers)
    bounds = torch.tensor([0, num_tokens])
    position_T = torch.from_numpy(shard_order(bounds.numpy(), ring)[mesh.ring.rank()].copy())
    packing = Packing.of_row(bounds, position_T, ring, mesh.ring.rank())
    tokens_BT = torch.zeros(1, len(position_T), dtype=torch.long)
    labels_BT = torch.full_like(tokens_BT, -100).index_fill(1, torch.arange(4), 1)
    with Allocations() as traced:
        hidden = chunk.embedding(input_ids=tokens_BT, position_ids=position_T[None])
        losses = chunk(
            tokens_BT, position_T[None], None, decoder_input=hidden, labels=labels_BT, packed_seq_params=packing
        )
        losses.sum().backward()
    return traced.peak


def test_a_layer_takes_what_is_counted(ranks: RankPool) -> None:
    # A narrow MLP: the peak is in attention. (Megatron's SwiGLU is fused on a GPU only.)
    config = language(hidden_size=192, num_heads=12, intermediate_size=8, num_layers=2)
    num_tokens = 2048
    shallow, deep = (
        ranks.run(traced_peak, 2, replace(config, num_layers=layers), 2, num_tokens)[0] for layers in (2, 6)
    )
    row = num_tokens // 2 * 192 * 2
    # A layer more is an input more. Of weights' gradients, which here are summed in bf16, the last layer has none yet.
    assert (deep - shallow) / 4 == pytest.approx(row, rel=1e-3)
    counted = costs.layer_memory(config, layout(ring=2), num_tokens)
    # A CPU takes more (1.18): its norm keeps two fp32 copies of a row, an eighth of the whole, and its attention copies
    # to fp32 a little more than the sums and copies within flash-attn's kernel. Each other buffer weighs more.
    assert 1 < (shallow - 2 * row) / counted < 1.25


def test_time_of_attention_by_hand() -> None:
    task = costs.Task(model(), tokens=64)
    work = costs.Work(attention=1024, products=0, encoder=0, model=0)
    where = layout(ring=4, ulysses=2)
    # 8 tokens a rank. All-to-all: of q, out, k and v with 8 + 8 + 4 + 4 heads of 4, half leaves. Three times.
    sent = 8 * 24 * 4 * 2 // 2
    transfers = costs.layer_transfers(task, work, where, MACHINE)
    assert transfers["Ulysses"] == 3 * sent
    # A block is 1024 / (4 layers x 8 ranks x 4 blocks) = 8 s, backward 20 s. A hop has keys and values of 16 tokens and
    # 2 heads of 4, 512 bytes; backward also their gradients in fp32. 3 hops, all but the block's time not hidden.
    assert transfers["ring, not hidden"] == 2 * 3 * (512 - 8) + 3 * (512 + 1024 - 20)
    # 8 x 32 entries of queries, twice 8 x 16 of keys and values.
    assert transfers["merging the ring's blocks"] == 3 * (2 * 18 * 256 + 10 * (256 + 256))
    # Slower blocks hide all; across nodes the ring has half the bandwidth.
    slow = costs.layer_transfers(task, replace(work, attention=1024 * 1000), where, MACHINE)
    assert slow["ring, not hidden"] == 0
    wide = costs.layer_transfers(task, work, where, replace(MACHINE, gpus_per_node=4))
    assert wide["ring, not hidden"] == 2 * 3 * (2 * 512 - 8) + 3 * (2 * 1536 - 20)
    assert wide["Ulysses"] == 3 * sent


def test_time_of_a_step_by_hand() -> None:
    task, work = costs.Task(model(), tokens=64), costs.Work(attention=320, products=640, encoder=160, model=0)
    seconds = costs.step_seconds(task, work, layout(tensor=2), MACHINE, 100)
    # Attention: forward, again, and 2.5 times as much backward. Products: forward, again, twice as much backward.
    assert seconds["attention"] == 4.5 * 320 / 2 and seconds["matrix products"] == 4 * 640 / 2
    # 4 layers, attention and MLP, 7 transfers of half a row of 64 x 32 in bf16.
    assert seconds["tensor parallel"] == 4 * 2 * 7 * 32 * 32 * 2
    # A rank's 8 of 16 frames: three passes, one of recomputing, and once more for those beyond 4.
    assert seconds["encoder"] == (4 + 4 / 8) * 160 / 2
    # 8 frames x 4 rows there and back; half of the encoder's gradients and weights.
    assert seconds["gradients, weights, visual tokens"] == 2 * 8 * 4 * 32 * 2 + 6 * 100 / 2
    assert seconds["pipeline bubble"] == 0


@pytest.mark.parametrize("documents", [1, 4])
def test_a_pipeline_waits_for_its_ends(documents: int) -> None:
    task, work = costs.Task(model(), 64, documents), costs.Work(attention=320, products=640, encoder=0, model=0)
    seconds = costs.step_seconds(task, work, layout(pipeline=4), MACHINE, 0)
    busy = documents * (4.5 * 320 + 4 * 640) / 4
    assert seconds["attention"] + seconds["matrix products"] == busy
    assert seconds["pipeline bubble"] == 3 * busy / documents


def test_layouts_are_those_that_a_job_accepts() -> None:
    dense = {layout.name for layout in costs.layouts(costs.Task(model(), 64), 4)}
    # tensor | pipeline | context: 4 key/value heads, 4 layers; each context split in every way.
    expected = {"1 | 1 | 4 = 4 x 1", "1 | 1 | 4 = 2 x 2", "1 | 1 | 4 = 1 x 4", "1 | 2 | 2 = 2 x 1", "1 | 2 | 2 = 1 x 2"}
    expected |= {"1 | 4 | 1 = 1 x 1", "2 | 1 | 2 = 2 x 1", "2 | 1 | 2 = 1 x 2", "2 | 2 | 1 = 1 x 1"}
    assert dense == expected | {"4 | 1 | 1 = 1 x 1"}
    mixed = model(moe=replace(MIXED, first_dense_layers=0))
    names = {layout.name for layout in costs.layouts(costs.Task(mixed, 64), 4)}
    assert dense < names and "2 | 1 | 2 = 2 x 1, expert 2 x 2" in names
    with pytest.raises(UserError, match="no layout on 5 GPUs"):
        costs.plans(costs.Task(model(), 64), 5, MACHINE)


def internvl26b(tokens: int) -> costs.Task:
    return costs.Task(load(JobConfig, compose(ROOT / "conf", "pretrain", ["model=internvl26b"])).model, tokens)


def test_a_million_tokens_fit_on_64_and_not_on_8() -> None:
    machine, task = costs.Machine(), internvl26b(2**20)
    small, large = (costs.plans(task, gpus, machine) for gpus in (8, 64))
    assert not any(plan.fits(machine) for plan in small)
    # The inputs of 48 layers alone: 131072 rows of 6144 in bf16 on each of 8 ranks, however they are laid out.
    assert small[0].memory["inputs of the layers"] == 48 * 2**20 // 8 * 6144 * 2
    assert large[0].fits(machine) and large[0].layout.parallel.pipeline == 1
    times = [plan.total_seconds for plan in large if plan.fits(machine)]
    assert times == sorted(times)
    tokens = costs.largest_document(task, 8, machine)
    assert 76800 < tokens < 2**20
    assert costs.plans(replace(task, tokens=tokens), 8, machine)[0].fits(machine)
    assert not costs.plans(replace(task, tokens=tokens + 256), 8, machine)[0].fits(machine)


def test_it_prints_markdown() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "long_context.py"), "--model", "internvl_tiny"]
    command += ["model.language.num_layers=2", "--tokens", "4096", "--gpus", "2", "--attention", "0.25"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "**not yet measured on a GPU**" in done.stdout and "attention 25%" in done.stdout
    assert "1,024 frames of 4 tokens and 0 tokens of text" in done.stdout
    assert "## 2 GPUs\n" in done.stdout and "Limit: " in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert all(line.endswith(" |") for line in rows)
    for start in ("| 1 | 1 | 2 = ", "| 2 | 1 | 1 = 1 x 1 |", "| 2 = 2 x 1 |", "| 2 = 1 x 2 |"):
        assert any(line.startswith(start) for line in rows), start
