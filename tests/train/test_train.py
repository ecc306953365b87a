"""The loop: what a step refuses, what a batch costs, how kinds of tokens weigh."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import shards
from megamed.train import JobConfig, build_job, fit
from megamed.train.meter import step_flops
from megamed.utils import UserError

SEQ_LENGTH = 64


def make_job(kernel: Any = "auto", **changes: Any) -> Any:
    config = JobConfig()
    config.model = tiny_vlm()
    config.parallel = ParallelConfig()
    config.optim = OptimConfig(lr=1e-2)
    config.data.seq_length = SEQ_LENGTH
    config.train.steps, config.train.microbatches = 3, 2
    config.attention.kernel = kernel
    for key, value in changes.items():
        setattr(config.train, key, value)
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(1, mesh.data_rank)
    return build_job(config, mesh)


class PoisonedSource(SyntheticSource):
    """The frames of the third step are not finite."""

    def load_frames(self, frames: Any) -> torch.Tensor:
        pixels = super().load_frames(frames)
        return pixels * float("nan") if any(f.first >= 4 for f in frames) else pixels


def poisoned() -> tuple[str, bool]:
    job = make_job()
    seen: list[Any] = []

    class Keep:
        def start(self, step: int) -> None: ...
        def after_step(self, event: Any) -> None:
            seen[:] = [shards(job.model, gradients=False), event.step]

        def end(self) -> None:
            raise AssertionError("a run that failed has no end")

    try:
        fit(job, PoisonedSource(SEQ_LENGTH), [Keep()], 0)
    except UserError as error:
        before, step = seen
        after = shards(job.model, gradients=False)
        return f"{step}: {error}", all((a[3] == b[3]).all() for a, b in zip(before, after, strict=True))
    return "nothing raised", False


def test_a_gradient_that_is_not_finite_changes_nothing(ranks: Any) -> None:
    said, unchanged = ranks.run(poisoned, 1)[0]
    assert said.startswith("2: step 3: the gradient norm is nan at loss nan; the weights are those of step 2.")
    assert unchanged


def counted() -> tuple[int, int]:
    job = make_job(kernel="math")
    source = SyntheticSource(SEQ_LENGTH)
    microbatches = [source.microbatch(i) for i in range(2)]
    # torch's counter does not know the CPU's flash kernels; the plain ones compute every score, masked or not.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        job.stepper.gradients(microbatches, source.load_frames)
    return step_flops(job.config.model, microbatches), counter.get_total_flops()


def test_step_flops_are_the_models_and_not_the_padding(ranks: Any) -> None:
    model_flops, computed = ranks.run(counted, 1)[0]
    # Rows are 64 tokens, of which 30 to 50 are real; what is computed also has padding and masked scores.
    # The vision tower, which pads nothing, is most of this model.
    assert 0.8 * computed < model_flops < computed


def losses(text_weight: float) -> Any:
    job = make_job(text_loss_weight=text_weight)
    source = SyntheticSource(SEQ_LENGTH)
    return job.stepper.gradients([source.microbatch(i) for i in range(2)], source.load_frames)


def test_kinds_of_tokens_weigh_as_set(ranks: Any) -> None:
    even, answers_only = ranks.run(losses, 1, 1.0)[0], ranks.run(losses, 1, 0.0)[0]
    assert answers_only.loss == answers_only.loss_by_kind["answer"]
    assert answers_only.loss_by_kind == even.loss_by_kind
    text, answer = even.loss_by_kind["text"], even.loss_by_kind["answer"]
    assert min(text, answer) < even.loss < max(text, answer)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("microbatches", 3, "train.microbatches=3 does not divide by the 2 model replicas"),
        ("steps", 0, "train.steps=0 must be 1 or more"),
        ("text_loss_weight", -1.0, "train.text_loss_weight=-1.0 must not be negative"),
    ],
)
def test_values_that_do_not_fit_are_named(key: str, value: Any, message: str) -> None:
    config = JobConfig()
    config.model = tiny_vlm()
    setattr(config.train, key, value)
    with pytest.raises(UserError, match=message):
        config.validate(world_size=2)


def test_a_model_that_does_not_divide_names_both_keys() -> None:
    config = JobConfig()
    config.model = tiny_vlm()
    config.parallel = ParallelConfig(tensor=4)
    with pytest.raises(UserError, match=r"parallel.tensor=4 does not divide model.language.num_kv_heads=2"):
        config.validate(world_size=4)
    config.parallel = ParallelConfig(expert=2)
    with pytest.raises(UserError, match="parallel.expert=2 needs experts"):
        config.validate(world_size=2)


def test_a_pipeline_stage_without_experts_is_refused() -> None:
    config = JobConfig()
    config.model = tiny_vlm(num_experts=4)
    config.parallel = ParallelConfig(expert=2, pipeline=2)
    config.model.language.moe.first_dense_layers = 1
    config.validate(world_size=4)
    config.model.language.moe.first_dense_layers = 2
    with pytest.raises(UserError, match="leaves the first pipeline stage, of 2 layers, without experts"):
        config.validate(world_size=4)
