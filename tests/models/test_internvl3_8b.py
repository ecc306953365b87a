"""InternVL3-8B on the meta device: the published model's sizes."""

from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from megamed import runtime
from megamed.config import compose, load
from megamed.models.language import build_language_chunks
from megamed.models.vision import internvit_300m
from megamed.models.vlm import FrameEncoder
from megamed.testing.ranks import RankPool
from megamed.train import JobConfig

CONF = Path(__file__).resolve().parents[2] / "conf"

# Qwen2.5-7B with InternVL's vocabulary: 28 query heads and 4 key/value heads of width 128, biases on q, k and v.
HIDDEN, LAYERS, INTERMEDIATE, VOCAB, PADDED_VOCAB = 3584, 28, 18944, 151674, 151680
QKV = (28 + 4 + 4) * 128
LAYER = HIDDEN * QKV + QKV + HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
LANGUAGE = LAYERS * LAYER + 2 * VOCAB * HIDDEN + HIDDEN


def job() -> JobConfig:
    return load(JobConfig, compose(CONF, "pretrain", ["model=internvl3_8b"]))


def language_shapes(config: JobConfig) -> list[tuple[int, ...]]:
    """Shapes of the language model's parameters, on one rank that has them all."""
    dist.destroy_process_group()  # the one of the test's real ranks
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    mesh = runtime.build_mesh(config.parallel)
    runtime.seed_everything(1234, mesh.data_rank)
    with runtime.meta_device():
        (chunk,) = build_language_chunks(config.model.language, config.attention, mesh, torch.bfloat16)
    return [tuple(p.shape) for p in chunk.parameters()]


def test_it_has_its_published_size(ranks: RankPool) -> None:
    config = job()
    config.model.validate()
    shapes = ranks.run(language_shapes, 1, config)[0]
    padding = 2 * (PADDED_VOCAB - VOCAB) * HIDDEN
    assert sum(map(prod, shapes)) == LANGUAGE + padding
    with torch.device("meta"):
        encoder = FrameEncoder(config.model.vision, config.model.projector)
    tower = sum(p.numel() for p in encoder.vision_tower.parameters())
    # LayerNorm of 4 patches side by side, and two linear layers with biases.
    projector = 2 * 4096 + (4096 + 1) * HIDDEN + (HIDDEN + 1) * HIDDEN
    assert sum(p.numel() for p in encoder.projector.parameters()) == projector
    assert tower == 304_012_288  # InternViT-300M
    assert LANGUAGE + tower + projector == count_of_transformers() == 7_944_373_760


def count_of_transformers() -> int:
    """Parameters of the same sizes in the implementation of transformers."""
    text = Qwen2Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=28, num_key_value_heads=4,
        intermediate_size=INTERMEDIATE,
    )  # fmt: skip
    vision = InternVLVisionConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, attention_bias=True,
        use_qk_norm=False, norm_type="layer_norm", image_size=[448, 448], patch_size=[14, 14],
    )  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
    return sum(p.numel() for p in model.parameters())


def test_its_tower_is_internvit_300m() -> None:
    vision = internvit_300m()
    vision.recompute = True
    assert job().model.vision == vision
