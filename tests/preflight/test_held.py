"""What preflight says that a rank in bf16 holds is what it holds; tests/parallel/test_parity.py has fp32."""

from typing import Any

import pytest

from megamed.models.language import AttentionConfig
from megamed.models.moe import PoolConfig
from megamed.optim import OptimConfig
from megamed.preflight import Held, built_rank, held_by
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, build_job

SP, PP, CP = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"context": 2}
# Ranks, layout, experts, distributed optimizer, type, further fields of the language model.
LAYOUTS: dict[str, tuple[int, dict[str, Any], int, bool, str, dict[str, Any]]] = {
    "one process, plain optimizer, bf16": (1, {}, 0, False, "bf16", {}),
    "DP2": (2, {}, 0, True, "bf16", {}),
    "PP2, tied": (2, PP, 0, True, "bf16", {"tie_embeddings": True}),
    "PP2, interleaved": (2, {**PP, "virtual_pipeline": 2}, 0, True, "bf16", {}),
    "EP2 x PP2 x DP2": (4, {"expert": 2, **PP}, 4, True, "bf16", {}),
    "TP2 + SP, ETP2": (2, {"expert_tensor": 2, **SP}, 4, True, "bf16", {}),
    "CP2 x EP2": (2, {"expert": 2, **CP}, 4, True, "bf16", {}),
    "specialists, soft, bias": (2, {"expert": 2}, -1, True, "bf16", {}),
}


def job(name: str) -> JobConfig:
    _, layout, experts, is_distributed, dtype, language = LAYOUTS[name]
    config = JobConfig()
    config.model = tiny_vlm(max(experts, 0), **language)
    if experts < 0:
        moe = config.model.language.moe
        moe.pools = {"general": PoolConfig(2), "chest": PoolConfig(2)}
        moe.routing, moe.balance = "soft", "bias"
    config.parallel = ParallelConfig(**layout)
    config.attention = AttentionConfig(ulysses=1)
    config.optim = OptimConfig(distributed=is_distributed)
    config.train.dtype = dtype  # type: ignore[assignment]
    config.data.seq_length = 64
    config.validate(LAYOUTS[name][0])
    return config


def _really_held(name: str) -> Held:
    config = job(name)
    mesh = build_mesh(config.parallel, config.ulysses, config.document_multiple)
    seed_everything(1, mesh.data_rank)
    built = build_job(config, mesh)
    return held_by(built.model, built.optimizer)


def held_by_rank(name: str, rank: int) -> Held:
    with built_rank(job(name), rank, LAYOUTS[name][0]) as built:
        return held_by(built.model, built.optimizer)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_said_is_what_is_held(name: str, ranks: Any) -> None:
    num_ranks = LAYOUTS[name][0]
    wanted = ranks.run(_really_held, num_ranks, name)
    found = [held_by_rank(name, rank) for rank in range(num_ranks)]
    assert found == wanted
    assert all(held.weights and held.gradients and held.optimizer for held in found)
    # All ranks of a stage hold as much: padding of a shard is at most 64 numbers a parameter, a few hundred bytes here.
    num_stages = job(name).parallel.pipeline
    for rank, held in enumerate(found):
        first = found[rank // (num_ranks // num_stages) * (num_ranks // num_stages)]
        assert abs(held.total - first.total) <= 0.02 * held.total


def test_mixed_precision_takes_what_it_is_known_to_take(ranks: Any) -> None:
    """bf16 weights 2 bytes a parameter, fp32 gradients 4, the optimizer's copy and moments 12."""
    held = held_by_rank("one process, plain optimizer, bf16", 0)
    num_parameters = held.weights // 2
    assert (held.gradients, held.optimizer) == (pytest.approx(4 * num_parameters, rel=0.02), 12 * num_parameters)
