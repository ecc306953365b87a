"""Routers can be trained alone for a while."""

from typing import Any

import pytest
import torch

from megamed.models.moe import PoolConfig
from megamed.optim import OptimConfig
from megamed.runtime import build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, build_job

WARMUP = 2


def _changed(distributed: bool) -> list[set[str]]:
    """Kinds of parameters that each of four steps changed."""
    config = JobConfig()
    config.model = tiny_vlm(0, num_layers=1)
    moe = config.model.language.moe
    moe.pools, moe.routing = {"general": PoolConfig(2), "chest": PoolConfig(2)}, "soft"
    config.optim = OptimConfig(lr=1e-2, warmup_steps=1, router_warmup_steps=WARMUP, distributed=distributed)
    config.data.seq_length, config.train.steps = 64, 4
    mesh = build_mesh(config.parallel)
    seed_everything(1, mesh.data_rank)
    job = build_job(config, mesh)
    source = SyntheticSource(64, specialties=((1, 0),))
    found = []
    for step in range(4):
        parameters = [(name, p, p.detach().clone()) for part in job.model.parts for name, p in part.named_parameters()]
        job.stepper.train([source.microbatch(step)], source.load_frames, job.optimizer)
        job.scheduler.step(1)
        moved = [name for name, now, before in parameters if not torch.equal(now, before)]
        found.append({"router" if ".router." in name else "other" for name in moved})
        if step == 1:
            assert any("router.weight" in name for name in moved) and any("router.prior" in name for name in moved)
    return found


@pytest.mark.parametrize("distributed", [True, False])
def test_first_routers_then_everything(ranks: Any, distributed: bool) -> None:
    first, second, *later = ranks.run(_changed, 1, distributed)[0]
    assert first == set(), "the learning rate starts at 0"
    assert second == {"router"}
    assert later == [{"router", "other"}] * 2
