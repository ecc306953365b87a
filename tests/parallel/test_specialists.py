"""Pools over expert-parallel ranks: who calls none leaves it alone, who calls one loads all ranks."""

from typing import Any

import numpy as np
import pytest

from megamed.models.moe import PoolConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import merge, shards
from megamed.train import JobConfig, build_job

SIZES = {"general": 2, "chest": 4, "neuro": 2}


def _chest_alone(dispatcher: str, experts: int) -> dict[str, Any]:
    """A batch in which every document calls chest, and one of text that calls nothing but padding follows."""
    config = JobConfig()
    config.model = tiny_vlm(0, num_layers=2)
    moe = config.model.language.moe
    moe.pools, moe.routing = {name: PoolConfig(size) for name, size in SIZES.items()}, "hard"
    moe.dispatcher = dispatcher  # type: ignore[assignment]
    config.parallel = ParallelConfig(expert=experts)
    config.data.seq_length = 64
    mesh = build_mesh(config.parallel)
    seed_everything(1, mesh.data_rank)
    job = build_job(config, mesh)
    source = SyntheticSource(64, plan=((2, 0, 1),), specialties=((1,),))
    microbatches = [source.microbatch(i) for i in range(mesh.data_rank, 4, mesh.data_size)]
    report = job.stepper.gradients(microbatches, source.load_frames)
    assert report.routing is not None
    return {"gradients": shards(job.model, gradients=True), "picks": report.routing.picks}


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_pool_that_nobody_calls_has_no_gradient(ranks: Any, dispatcher: str) -> None:
    results = ranks.run(_chest_alone, 2, dispatcher, 2)
    gradients, picks = merge([r["gradients"] for r in results]), results[0]["picks"]
    pools = tiny_vlm(0).language.moe
    pools.pools = {name: PoolConfig(size) for name, size in SIZES.items()}
    members = pools.resolved.members
    experts = {
        name: [value for key, value in gradients.items() if ".experts." in key and _expert(key) in numbers]
        for name, numbers in members.items()
    }
    assert len(experts["neuro"]) == 2 * 2 * len(members["neuro"]), "two layers of two matrices each"
    assert not any(value.any() for value in experts["neuro"])
    assert any(value.any() for value in experts["chest"])
    assert not picks[:, :, list(members["neuro"])].any()
    assert picks[:, -1].sum(1).tolist() == picks[:, 0].sum(1).tolist(), "every token has the specialty chest"


def _expert(name: str) -> int:
    """Number of the expert that a gradient belongs to: names end with it, in brackets."""
    return int(name[name.rindex("[") + 1 : -1])


def test_one_specialty_loads_every_rank(ranks: Any) -> None:
    picks = ranks.run(_chest_alone, 2, "alltoall", 2)[0]["picks"][:, -1]
    load = picks.reshape(len(picks), 2, -1).sum(2)
    assert load.min() > 0
    # Were a pool's experts together, one rank would have all that the general pool does not take.
    assert np.all(load.max(1) / load.mean(1) < 1.5)
