"""A new run starts from the weights of another, at any layout, and takes nothing else of it."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamed.checkpoint import CheckpointConfig, CheckpointManager, find_checkpoint
from megamed.checkpoint.card import describe_model, differing_key
from megamed.checkpoint.weights import Weights
from megamed.models.moe import PoolConfig
from megamed.models.vlm import VLMConfig
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import merge, shards
from megamed.train import Job, JobConfig, build_job
from megamed.train.run import describe
from megamed.utils import UserError

POOLS = {"general": 2, "chest": 2}
SPECIALTIES = ((1, 0), (0,))


def model(dense: bool = False, **moe: Any) -> VLMConfig:
    config = tiny_vlm(num_layers=2, tie_embeddings=True)
    if not dense:
        pools = {name: PoolConfig(size) for name, size in POOLS.items()}
        config.language.moe = replace(config.language.moe, pools=pools, **moe)
    return config


def build(config: VLMConfig, layout: dict[str, Any], folder: str, seed: int, dtype: Any) -> tuple[Job, Any]:
    job_config = JobConfig()
    job_config.model, job_config.parallel = config, ParallelConfig(**layout)
    job_config.optim = OptimConfig(lr=1e-2, warmup_steps=1)
    job_config.data.seq_length = 64
    job_config.train.seed, job_config.train.dtype = seed, dtype
    mesh = build_mesh(job_config.parallel, job_config.ulysses)
    seed_everything(1, mesh.data_rank)
    job = build_job(job_config, mesh)
    settings, saved = CheckpointConfig(asynchronous=False), (job.model, job.optimizer, job.scheduler)
    return job, CheckpointManager(Path(folder), settings, *saved, mesh, describe(job_config, mesh))


def step(job: Job) -> float:
    source = SyntheticSource(64, specialties=SPECIALTIES)
    microbatches = [source.microbatch(i) for i in range(job.mesh.data_rank, 4, job.mesh.data_size)]
    loss = job.stepper.train(microbatches, source.load_frames, job.optimizer).loss
    job.scheduler.step(1)
    return loss


def save(config: VLMConfig, layout: dict[str, Any], folder: str, dtype: str = "fp32") -> Any:
    """Train two steps and save; the weights are then of no seed."""
    job, manager = build(config, layout, folder, 1, dtype)
    for _ in range(2):
        step(job)
    manager.save(2, 8)
    return shards(job.model, gradients=False), step(job)


def start(config: VLMConfig, layout: dict[str, Any], folder: str, path: str, dtype: str = "fp32") -> Any:
    """Weights after starting from a checkpoint, with another seed; loss of a step; weights after it; log lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("megamed.checkpoint.manager")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    job, manager = build(config, layout, folder, 2, dtype)
    assert manager.start_from(path) == {"step": 0, "position": 0}
    log.removeHandler(handler)
    before = shards(job.model, gradients=False)
    assert job.scheduler.num_steps == 0
    return before, step(job), shards(job.model, gradients=False), lines


@pytest.mark.parametrize(
    ("dense", "ranks_before", "before", "ranks_after", "after"),
    [
        (True, 2, {"tensor": 2, "sequence": True}, 2, {"pipeline": 2}),
        (False, 2, {"pipeline": 2}, 2, {"expert": 2, "tensor": 2, "sequence": True}),
    ],
    ids=["dense: TP to PP", "PP2 to EP2 x TP2 + SP"],
)
def test_any_layout_starts_with_the_same_weights(
    dense: bool, ranks_before: int, before: Any, ranks_after: int, after: Any, ranks: Any, tmp_path: Path
) -> None:
    config = model(dense, **({} if dense else {"routing": "soft", "balance": "bias"}))
    saved = ranks.run(save, ranks_before, config, before, str(tmp_path / "checkpoints"))
    started = ranks.run(start, ranks_after, config, after, str(tmp_path / "new"), str(tmp_path))
    want, got = merge([s for s, _ in saved]), merge([s[0] for s in started])
    assert set(got) == set(want)
    for name, value in want.items():
        assert np.array_equal(got[name], value), name
    # The loss of the next step is the same to the parity table's tolerance: other orders of fp32 sums.
    assert started[0][1] == pytest.approx(saved[0][1], rel=1e-5)


def test_bf16_trains_on_from_the_weights_and_not_from_the_copies_of_the_first_ones(ranks: Any, tmp_path: Path) -> None:
    config = model(dense=True)
    ranks.run(save, 1, config, {}, str(tmp_path / "checkpoints"), "bf16")
    before, _, after, _ = ranks.run(start, 1, config, {}, str(tmp_path / "new"), str(tmp_path), "bf16")[0]
    # The first step of the warm-up has the rate 0: what it writes to the model is the optimizer's own copies.
    old, new = merge([before]), merge([after])
    assert all(np.array_equal(new[name], value) for name, value in old.items())


def test_what_routers_keep_comes_and_goes_with_the_settings(ranks: Any, tmp_path: Path) -> None:
    free, soft = model(), model(routing="soft", balance="bias", prior_init=3.0)
    ranks.run(save, 1, free, {}, str(tmp_path / "free"))
    ranks.run(save, 1, soft, {}, str(tmp_path / "soft"))
    weights, _, _, lines = ranks.run(start, 1, soft, {}, str(tmp_path / "new"), str(tmp_path / "free"))[0]
    found = merge([weights])
    prior = found["decoder.layers.0.mlp.router.prior"]
    assert np.array_equal(prior, [[3, 3, 3, 3]])  # general and chest
    assert not found["decoder.layers.0.mlp.router.expert_bias"].any()
    assert [line for line in lines if "have no prior" in line] and [line for line in lines if "have no expert" in line]
    weights, _, _, lines = ranks.run(start, 1, free, {}, str(tmp_path / "new"), str(tmp_path / "soft"))[0]
    assert not [name for name in merge([weights]) if name.endswith(("prior", "expert_bias"))]
    assert "its routers' prior is left behind, as model.language.moe.routing is not soft" in lines


def resume(config: VLMConfig, folder: str) -> None:
    build(config, {}, folder, 1, "fp32")[1].load(find_checkpoint(Path(folder), "run.dir"))


def test_other_models_are_refused_with_the_key(ranks: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    ranks.run(save, 1, model(), {}, folder)
    swapped = model()
    swapped.language.moe.pools = dict(reversed(swapped.language.moe.pools.items()))
    wide = model(intermediate_size=64)
    for other, message in (
        (model(dense=True), r"model\.language\.moe was general=2 chest=2, is now dense"),
        (swapped, r"model\.language\.moe was general=2 chest=2, is now chest=2 general=2"),
        (wide, r"model\.language\.moe\.intermediate_size was 48, is now 64"),
    ):
        with pytest.raises(AssertionError, match=message):
            ranks.run(start, 1, other, {}, str(tmp_path / "new"), folder)
    with pytest.raises(AssertionError, match=r"its routers have no prior; set model\.language\.moe\.routing back"):
        ranks.run(resume, 1, model(routing="soft"), folder)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init\.checkpoint=\S+nowhere: is no folder"):
        find_checkpoint(tmp_path / "nowhere", "init.checkpoint")
    (tmp_path / "step_00000002.unfinished").mkdir()
    with pytest.raises(UserError, match=r"holds no checkpoint \(no megamed.json"):
        find_checkpoint(tmp_path, "init.checkpoint")


def test_a_flipped_byte_is_noticed(ranks: Any, tmp_path: Path) -> None:
    config = model(dense=True)
    ranks.run(save, 2, config, {}, str(tmp_path / "checkpoints"))
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    weights = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match=f"{weights.name} is damaged: its checksum is another; take another"):
        ranks.run(start, 2, config, {}, str(tmp_path / "new"), str(checkpoint))


def test_settings_of_training_are_no_part_of_a_model() -> None:
    was = describe_model(model(routing="free", top_k=2))
    trained = model(routing="soft", balance="bias", specialty_dropout=0.5, log_every=7, z_loss_coeff=1.0)
    assert differing_key(was, describe_model(trained)) is None
    assert differing_key(was, describe_model(model(top_k=1))) == ("language.moe.top_k", 2, 1)
    # A card that is older than a setting was written with what is now its default.
    older = {key: value for key, value in was.items() if key != "language.moe.score_function"}
    assert differing_key(older, was) is None


def test_metadata_that_would_run_code_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match=r"its metadata name os\.system"):
        Weights(tmp_path)
