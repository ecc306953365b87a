"""InternVL-26B on the meta device: the published model's sizes, and what one rank of eight holds."""

from collections import Counter
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megamed import runtime
from megamed.config import compose, load
from megamed.models.language import build_language_chunks
from megamed.models.vlm import FrameEncoder
from megamed.testing.ranks import RankPool
from megamed.train import JobConfig

CONF = Path(__file__).resolve().parents[2] / "conf"
Shapes = dict[str, tuple[int, ...]]

# InternLM2-20B with InternVL's vocabulary: 48 query heads and 8 key/value heads of width 128.
HIDDEN, LAYERS, INTERMEDIATE, VOCAB = 6144, 48, 16384, 92553
PADDED_VOCAB = 92672
LAYER_MATRICES = HIDDEN * (48 + 8 + 8) * 128 + HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
LAYER_NORMS = 2 * HIDDEN


def job(experiment: str = "internvl26b") -> JobConfig:
    return load(JobConfig, compose(CONF, "pretrain", [f"+exp={experiment}", "data.tokenizer=bytes"]))


def build_rank(rank: int, config: JobConfig, world_size: int) -> tuple[Shapes, bool, dict[str, int]]:
    """Shapes of the language model's parameters on one rank, whether all are bf16 on the meta device, and the
    sizes of the rank's groups."""
    dist.destroy_process_group()  # the one of the test's real ranks
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    mesh = runtime.build_mesh(config.parallel, config.ulysses)
    runtime.seed_everything(1234, mesh.data_rank)
    with runtime.meta_device():
        (chunk,) = build_language_chunks(
            config.model.language, config.attention, mesh, torch.bfloat16
        )
    parameters = dict(chunk.named_parameters())
    assert not list(chunk.buffers())
    right = all(p.is_meta and p.dtype == torch.bfloat16 for p in parameters.values())
    groups = {"ring": mesh.ring, "ulysses": mesh.ulysses, "context": mesh.language.cp, "expert": mesh.language.ep}
    sizes = {name: group.size() for name, group in groups.items()}
    return {name: tuple(p.shape) for name, p in parameters.items()}, right, sizes


def shapes_on(ranks: RankPool, rank: int, world_size: int = 8, **parallel: int | bool) -> Shapes:
    config = job()
    for key, value in parallel.items():
        setattr(config.parallel, key, value)
    shapes, on_meta_in_bf16, _ = ranks.run(build_rank, 1, rank, config, world_size)[0]
    assert on_meta_in_bf16
    return shapes


def count(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())


def test_internlm2_20b_has_its_published_size(ranks: RankPool) -> None:
    shapes = shapes_on(ranks, 0, world_size=1, tensor=1, pipeline=1, sequence=False)
    padding = 2 * (PADDED_VOCAB - VOCAB) * HIDDEN
    published = LAYERS * (LAYER_MATRICES + LAYER_NORMS) + 2 * VOCAB * HIDDEN + HIDDEN
    assert published == 19_861_260_288
    assert count(shapes) == published + padding


@pytest.mark.parametrize("rank", [0, 3, 4, 7])
def test_a_rank_of_tensor_4_pipeline_2(rank: int, ranks: RankPool) -> None:
    shapes = shapes_on(ranks, rank)
    last_stage = rank >= 4
    expected = LAYERS // 2 * (LAYER_MATRICES // 4 + LAYER_NORMS) + PADDED_VOCAB // 4 * HIDDEN
    expected += HIDDEN if last_stage else 0  # the final norm
    assert count(shapes) == expected
    assert round(expected / 1e9, 3) == 2.483
    layers = Counter(name.split(".")[2] for name in shapes if name.startswith("decoder.layers."))
    assert len(layers) == LAYERS // 2 and set(layers.values()) == {6}
    embedding = "output_layer.weight" if last_stage else "embedding.word_embeddings.weight"
    assert shapes[embedding] == (PADDED_VOCAB // 4, HIDDEN)
    assert ("decoder.final_layernorm.weight" in shapes) == last_stage
    assert shapes["decoder.layers.0.self_attention.linear_qkv.weight"] == ((48 + 8 + 8) * 128 // 4, HIDDEN)
    assert shapes["decoder.layers.0.mlp.linear_fc1.weight"] == (2 * INTERMEDIATE // 4, HIDDEN)


@pytest.mark.parametrize("rank", [0, 63])
def test_a_rank_of_the_64_gpu_layout(rank: int, ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job("gpu64")
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    config.validate(64)
    config.attention.ring, config.attention.ulysses = 4, config.ulysses  # as picked: ranks know no torchrun
    shapes, _, sizes = ranks.run(build_rank, 1, rank, config, 64)[0]
    assert sizes == {"ring": 4, "ulysses": 2, "context": 8, "expert": 2}
    experts = [shape for name, shape in shapes.items() if ".experts." in name]
    # 8 experts over 2 ranks and each over 4 more; two matrices, the first for gate and up; 24 of 48 layers.
    assert len(experts) == LAYERS // 2 * 4 * 2
    assert set(experts) == {(2 * 8192 // 4, HIDDEN), (HIDDEN, 8192 // 4)}


def test_internvit_6b_has_its_published_size() -> None:
    config = job().model
    with runtime.meta_device():
        encoder = FrameEncoder(config.vision, config.projector)
    assert all(p.is_meta for p in encoder.parameters())
    width, inner = 3200, 12800
    # q, k, v without bias, the way out with one; two linear layers; two norms, norms of q and k, two scales.
    layer = 4 * width * width + width + (2 * width * inner + inner + width) + 6 * width
    embeddings = width + 1025 * width + (3 * 14 * 14 * width + width)
    assert sum(p.numel() for p in encoder.vision_tower.parameters()) == 45 * layer + embeddings
    assert round((45 * layer + embeddings) / 1e9, 2) == 5.54
    config.validate()


def test_meta_device_ends_with_its_block() -> None:
    with pytest.raises(KeyError), runtime.meta_device():
        assert torch.cuda.current_device() == torch.empty(1).device == torch.device("meta")
        assert torch.zeros(1, device="cuda").is_meta
        raise KeyError
    assert torch.cuda.current_device() == torch.zeros(1, device="cuda").device == torch.device("cpu")
