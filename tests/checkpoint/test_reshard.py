"""A checkpoint goes on where the run was: bit for bit at its own layout, with the same losses at another."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megamed.checkpoint import CheckpointConfig, CheckpointManager, list_checkpoints, read_card
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, build_job
from megamed.train.run import describe
from megamed.utils import UserError

MICROBATCHES, SEQ_LENGTH, BREAK, END = 4, 64, 2, 4


@dataclass(frozen=True)
class Layout:
    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    distributed: bool = True


ONE = Layout()
TP2 = Layout(2, {"tensor": 2})
TP2_SP = Layout(2, {"tensor": 2, "sequence": True})
PP2 = Layout(2, {"pipeline": 2})
PP2_VPP2 = Layout(2, {"pipeline": 2, "virtual_pipeline": 2})
DP2 = Layout(2)
DP2_PLAIN = Layout(2, distributed=False)
TP2_PP2_DP2 = Layout(8, {"tensor": 2, "pipeline": 2})
EP2 = Layout(2, {"expert": 2})
EP2_PP2_DP2 = Layout(4, {"expert": 2, "pipeline": 2})
CP2_PP2 = Layout(4, {"context": 2, "pipeline": 2})
EP2_CP2_DP2 = Layout(4, {"expert": 2, "context": 2})
EP2_TP2_SP = Layout(2, {"expert": 2, "tensor": 2, "sequence": True})


def train(layout: Layout, experts: int, folder: str, steps: tuple[int, int], vary: dict[str, Any]) -> list[Any]:
    """Take some steps, from a checkpoint where they do not start at 0, save, and return losses and norms."""
    config = JobConfig()
    config.model = tiny_vlm(experts, tie_embeddings=True, **vary)
    config.parallel = ParallelConfig(**layout.parallel)
    config.optim = OptimConfig(lr=1e-2, warmup_steps=1, distributed=layout.distributed)
    config.data.seq_length = SEQ_LENGTH
    config.train.steps = END
    config.train.seed = 1 + steps[0]  # so that a load that left anything out would show
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(1, mesh.data_rank)
    job = build_job(config, mesh)
    source = SyntheticSource(SEQ_LENGTH)
    settings = CheckpointConfig(keep_last=0, asynchronous=bool(experts))
    facts = describe(config, mesh)
    manager = CheckpointManager(Path(folder), settings, job.model, job.optimizer, job.scheduler, mesh, facts)
    if steps[0]:
        card = manager.load(list_checkpoints(Path(folder))[0])
        assert card["step"] == steps[0] and card["position"] == steps[0] * MICROBATCHES
    numbers: list[Any] = []
    for step in range(*steps):
        indices = range(step * MICROBATCHES + mesh.data_rank, (step + 1) * MICROBATCHES, mesh.data_size)
        report = job.stepper.train([source.microbatch(i) for i in indices], source.load_frames, job.optimizer)
        job.scheduler.step(1)
        numbers.append((report.loss, report.grad_norm, job.optimizer.param_groups[0]["lr"]))
        if not steps[0] and step + 1 == BREAK:
            manager.save(BREAK, BREAK * MICROBATCHES)
    manager.wait()
    return numbers


@pytest.mark.parametrize(
    ("layout", "experts"),
    [(ONE, 0), (TP2_PP2_DP2, 0), (PP2_VPP2, 0), (DP2_PLAIN, 0), (EP2_PP2_DP2, 4), (CP2_PP2, 0)],
    ids=["one process", "TP2 x PP2 x DP2", "PP2 interleaved", "DP2 plain optimizer", "MoE: EP2 x PP2 x DP2", "CP x PP"],
)
def test_same_layout_goes_on_bit_for_bit(layout: Layout, experts: int, ranks: Any, tmp_path: Path) -> None:
    whole = ranks.run(train, layout.ranks, layout, experts, str(tmp_path), (0, END), {})
    resumed = ranks.run(train, layout.ranks, layout, experts, str(tmp_path), (BREAK, END), {})
    for rank in range(layout.ranks):
        assert resumed[rank] == whole[rank][BREAK:]


@pytest.mark.parametrize(
    ("before", "after", "experts"),
    [
        (ONE, TP2_PP2_DP2, 0),
        (TP2_PP2_DP2, ONE, 0),
        (TP2_SP, PP2_VPP2, 0),
        (PP2, TP2, 0),
        (EP2, ONE, 4),
        (ONE, EP2_PP2_DP2, 4),
        (EP2_PP2_DP2, EP2_TP2_SP, 4),
        (CP2_PP2, TP2, 0),
        (ONE, EP2_CP2_DP2, 4),
    ],
    ids=[
        "1 to 8", "8 to 1", "TP to interleaved PP", "PP to TP", "EP2 to 1", "1 to EP2 PP2 DP2", "EP DP PP to EP TP",
        "CP PP to TP", "1 to EP2 CP2 DP2",
    ],  # fmt: skip
)
def test_another_layout_goes_on_with_the_same_losses(
    before: Layout, after: Layout, experts: int, ranks: Any, tmp_path: Path
) -> None:
    whole = ranks.run(train, before.ranks, before, experts, str(tmp_path), (0, END), {})[0]
    resumed = ranks.run(train, after.ranks, after, experts, str(tmp_path), (BREAK, END), {})[0]
    for got, want in zip(resumed, whole[BREAK:], strict=True):
        # The same bar as for the parity of layouts: other orders of fp32 sums.
        assert got == pytest.approx(want, rel=1e-5)


def test_checkpoint_of_another_model_is_refused_with_the_key(ranks: Any, tmp_path: Path) -> None:
    ranks.run(train, 1, ONE, 0, str(tmp_path), (0, BREAK), {})
    with pytest.raises(AssertionError, match=r"model\.language\.intermediate_size was 96, is now 128"):
        ranks.run(train, 1, ONE, 0, str(tmp_path), (BREAK, END), {"intermediate_size": 128})


def test_damaged_card_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_00000002"
    checkpoint.mkdir()
    (checkpoint / "megamed.json").write_text("{")
    assert list_checkpoints(tmp_path) == [checkpoint]
    with pytest.raises(UserError, match="step_00000002: megamed.json cannot be read"):
        read_card(checkpoint)
