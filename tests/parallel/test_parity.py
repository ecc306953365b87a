"""Every parallel layout computes what one process computes: losses of three steps, and every gradient.

`make parity` runs this file and writes what it measured to docs/parity.md.
"""

import datetime
import functools
import os
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import pytest
import torch

from megamed.models.language import AttentionConfig
from megamed.models.moe import PoolConfig
from megamed.optim import OptimConfig
from megamed.preflight import built_rank, held_by
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import MIXED, SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import merge, shards
from megamed.train import JobConfig, build_job

STEPS, MICROBATCHES, SEQ_LENGTH = 3, 8, 64

# Pools of the rows with specialists, the specialties of documents by microbatch (bit 0 chest, bit 1 neuro): one, both,
# none, and batches in which nobody calls a pool.
POOLS = {"general": 4, "chest": 4, "neuro": 4}
SPECIALTIES = ((1, 2, 0), (3, 1), (0,), (1, 1))

# Larger layouts run on request.
MAX_RANKS = 8

# Relative to the tensor's largest gradient. fp32 has 1.2e-7; sums over a few hundred terms in another order
# spread that by one or two digits.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Row:
    """A layout and the model that it is measured with."""

    name: str
    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    experts: int = 0
    specialists: dict[str, Any] = field(default_factory=dict)
    """Fields of the experts' settings; with any, the experts are pools, and documents have specialties."""
    distributed: bool = False
    language: dict[str, Any] = field(default_factory=dict)
    """Fields of the language model; the reference of a row has the same ones."""
    attention: dict[str, Any] = field(default_factory=dict)
    dispatcher: str = "alltoall"
    recompute: bool = False
    text_only: bool = False
    frames_in_flight: int | None = None


SP = {"tensor": 2, "sequence": True}
PP = {"pipeline": 2}
CP = {"context": 2}
TIED = {"tie_embeddings": True}
BIASED = {"routing": "soft", "balance": "bias", "score_function": "sigmoid", "bias_update_rate": 0.01}
SPECIALIST_LAYOUTS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("EP2", 2, {"expert": 2}),
    ("EP4", 4, {"expert": 4}),
    ("EP2 x TP2 + SP", 2, {"expert": 2, **SP}),
    ("EP2 x PP2", 4, {"expert": 2, **PP}),
    ("EP2 x CP2", 2, {"expert": 2, **CP}),
    ("EP2 x TP2 + SP x PP2", 4, {"expert": 2, **SP, **PP}),
)
ROWS = (
    Row("TP2", 2, {"tensor": 2}),
    Row("TP2 + SP", 2, SP),
    Row("PP2", 2, PP),
    Row("PP2, interleaved", 2, {**PP, "virtual_pipeline": 2}),
    Row("DP2", 2),
    Row("DP2, distributed optimizer", 2, distributed=True),
    Row("TP2 x PP2", 4, {"tensor": 2, **PP}),
    Row("TP2 x PP2 x DP2", 8, {"tensor": 2, **PP}, distributed=True),
    Row("TP2 + SP x PP4, recompute", 8, {**SP, "pipeline": 4}, distributed=True, recompute=True),
    Row("PP2, tied embeddings", 2, PP, language=TIED),
    Row(
        "TP2 x PP2, tied embeddings, qkv bias",
        4,
        {"tensor": 2, **PP},
        language={**TIED, "qkv_bias": True},
    ),
    Row("TP2 + SP x DP2, no frame anywhere", 4, SP, distributed=True, text_only=True),
    Row("MoE: DP2", 2, experts=4),
    Row("MoE: EP2", 2, {"expert": 2}, experts=4),
    Row("MoE: EP2 x TP2 + SP", 2, {"expert": 2, **SP}, experts=4),
    Row("MoE: EP2 x PP2 x DP2", 4, {"expert": 2, **PP}, experts=4, distributed=True),
    Row("MoE: EP2 x PP2 x DP4", 8, {"expert": 2, **PP}, experts=4, distributed=True),
    Row("MoE: EP2 x TP2 + SP x PP2, interleaved", 4, {"expert": 2, **SP, **PP, "virtual_pipeline": 2}, experts=4),
    Row("MoE: EP4 x ETP1 x TP2 + SP x DP2", 4, {"expert": 4, **SP}, experts=4, distributed=True),
    Row("MoE: TP2 + SP, experts split too (ETP2)", 2, {"expert_tensor": 2, **SP}, experts=4),
    Row("MoE: EP2, allgather dispatcher", 2, {"expert": 2}, experts=4, dispatcher="allgather"),
    Row("MoE: DP2, recompute", 2, experts=4, recompute=True),
    Row("CP2 (ring)", 2, CP),
    Row("CP4 (ring)", 4, {"context": 4}, attention={"ring": 4}),
    Row("CP8 (ring)", 8, {"context": 8}, attention={"ring": 8}),
    Row("CP2 (ring) x Ulysses2", 4, {"context": 4}, attention={"ring": 2, "ulysses": 2}),
    Row("Ulysses4, 2 KV heads", 4, {"context": 4}, attention={"ulysses": 4}),
    Row("CP2 x TP2 + SP", 4, {**CP, **SP}, distributed=True),
    Row("Ulysses2 x TP2 + SP, 1 KV head", 4, {**CP, **SP}, attention={"ulysses": 2}),
    Row("CP2 x PP2", 4, {**CP, **PP}),
    Row("CP2 x PP2, interleaved, tied embeddings", 4, {**CP, **PP, "virtual_pipeline": 2}, language=TIED),
    Row("CP2 x TP2 x PP2", 8, {**CP, "tensor": 2, **PP}),
    Row("CP2 x DP2, no frame anywhere", 4, CP, distributed=True, text_only=True),
    Row("CP2 x PP2, recompute, 1 frame in flight", 4, {**CP, **PP}, recompute=True, frames_in_flight=1),
    Row("MoE: CP2 x EP2", 2, {**CP, "expert": 2}, experts=4),
    Row("MoE: CP2 x EP2 x DP2", 4, {**CP, "expert": 2}, experts=4, distributed=True),
    Row("MoE: CP2 x EP2 x PP2, recompute", 4, {**CP, "expert": 2, **PP}, experts=4, recompute=True),
    Row("MoE: CP2 x EP4 x TP2 + SP x PP2, recompute", 8, {**CP, **SP, **PP, "expert": 4}, experts=4, recompute=True),
    Row("MoE: CP2 x EP2 x ETP2 x TP2 + SP x PP2", 8, {**CP, **SP, **PP, "expert": 2, "expert_tensor": 2}, experts=4),
    *(
        Row(f"Specialists, {routing}: {name}", ranks, layout, specialists={"routing": routing})
        for name, ranks, layout in SPECIALIST_LAYOUTS
        for routing in ("soft", "hard", "free")
    ),
    Row("Specialists, soft, sigmoid, bias: EP2 x CP2 x DP2", 4, {**CP, "expert": 2}, specialists=BIASED),
    Row("Specialists, hard, recompute: EP2 x PP2, allgather", 4, {**PP, "expert": 2}, specialists={"routing": "hard"},
        recompute=True, dispatcher="allgather"),
    # conf/parallel/gpu64.yaml
    Row(
        "MoE: CP8 (ring 4 x Ulysses2) x EP2 x ETP4 x TP4 + SP x PP2",
        64,
        {"tensor": 4, "sequence": True, **PP, "context": 8, "expert": 2, "expert_tensor": 4},
        experts=4,
        distributed=True,
        language={"num_heads": 8, "num_kv_heads": 4},
        attention={"ring": 4, "ulysses": 2},
    ),
)


def job_of(row: Row) -> JobConfig:
    """The settings of a row."""
    config = JobConfig()
    config.model = tiny_vlm(row.experts, num_layers=2 if row.specialists else 4, **row.language)
    if row.specialists:
        pools = {name: PoolConfig(size) for name, size in POOLS.items()}
        config.model.language.moe = replace(config.model.language.moe, pools=pools, **row.specialists)
    config.model.language.recompute = config.model.vision.recompute = row.recompute
    config.model.language.moe.dispatcher = row.dispatcher
    config.model.frames_in_flight = row.frames_in_flight
    config.parallel = ParallelConfig(**row.parallel)
    config.attention = AttentionConfig(**{"ulysses": 1, **row.attention})
    config.optim = OptimConfig(lr=1e-2, distributed=row.distributed)
    config.data.seq_length = SEQ_LENGTH
    config.train.steps = STEPS
    return config


def measure(row: Row) -> dict[str, Any]:
    """One rank's side: train three steps, and keep losses, norms, the first step's gradients and a frame count."""
    config = job_of(row)
    mesh = build_mesh(config.parallel, config.ulysses)
    seed_everything(1, mesh.data_rank)
    job = build_job(config, mesh)
    source = SyntheticSource(
        SEQ_LENGTH,
        plan=((0, 0), (0,)) if row.text_only else MIXED,
        specialties=SPECIALTIES if row.specialists else ((0,),),
    )
    encoded = 0

    def count(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal encoded
        encoded += len(inputs[0])

    losses, norms, moe, routing, gradients = [], [], [], [], []
    for step in range(STEPS):
        indices = range(step * MICROBATCHES + mesh.data_rank, (step + 1) * MICROBATCHES, mesh.data_size)
        microbatches = [source.microbatch(i) for i in indices]
        if step == 0:
            job.stepper.gradients(microbatches, source.load_frames)
            gradients = shards(job.model, gradients=True)
            job.model.vision.module.register_forward_pre_hook(count)
        report = job.stepper.train(microbatches, source.load_frames, job.optimizer)
        job.scheduler.step(1)
        losses.append(report.loss)
        norms.append(report.grad_norm)
        moe.append(report.moe_losses)
        routing.append(report.routing and report.routing.picks)
    return {
        "losses": losses, "norms": norms, "moe": moe, "routing": routing, "gradients": gradients, "encoded": encoded,
        "held": held_by(job.model, job.optimizer),
    }  # fmt: skip


@functools.cache
def _frames_of_one_pass(text_only: bool) -> int:
    source = SyntheticSource(SEQ_LENGTH, plan=((0, 0), (0,)) if text_only else MIXED)
    return sum(len(source.microbatch(i).frames) for i in range(STEPS * MICROBATCHES))


class References:
    """What one process computes, once for each kind of model."""

    def __init__(self, ranks: Any):
        self.ranks, self.known = ranks, {}

    def of(self, row: Row) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        key = (row.experts, str(row.specialists), tuple(sorted(row.language.items())), row.text_only)
        if key not in self.known:
            one = Row(
                "one process", 1, experts=row.experts, specialists=row.specialists, language=row.language,
                text_only=row.text_only,
            )
            result = self.ranks.run(measure, 1, one)[0]
            self.known[key] = result, merge([result["gradients"]])
        return self.known[key]


@pytest.fixture(scope="module")
def references(ranks: Any) -> References:
    return References(ranks)


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Any:
    """Collects the measured rows, and writes them where `--parity-table` says."""
    rows: list[str] = []
    yield rows
    many = request.config.getoption("--many-ranks")
    path = request.config.getoption("--parity-table")
    if path and len(rows) == sum(row.ranks <= MAX_RANKS or many for row in ROWS):
        Path(path).write_text(_page(rows))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layout_equals_one_process(
    row: Row, ranks: Any, references: References, table: list[str], request: pytest.FixtureRequest
) -> None:
    if row.ranks > MAX_RANKS and not request.config.getoption("--many-ranks"):
        pytest.skip("minutes on a small machine: --many-ranks runs it")
    reference, expected = references.of(row)
    results = ranks.run(measure, row.ranks, row)
    gradients = merge([r["gradients"] for r in results])

    assert gradients.keys() == expected.keys()
    errors = {name: _error(gradients[name], expected[name]) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    losses = np.array([r["losses"] for r in results])
    loss_error = float(np.abs(losses / reference["losses"] - 1).max())
    norm_error = float(np.abs(np.array([r["norms"] for r in results]) / reference["norms"] - 1).max())
    encoded, once = sum(r["encoded"] for r in results), _frames_of_one_pass(row.text_only)
    ratio = encoded / once if once else 1.0
    table.append(
        f"| {row.name} | {row.ranks} | {loss_error:.1e} | {errors[worst]:.1e} | {norm_error:.1e} | {ratio:.2f} |"
    )

    assert errors[worst] <= TOLERANCE, f"gradient of {worst}"
    assert loss_error <= TOLERANCE
    assert norm_error <= TOLERANCE
    if row.frames_in_flight is None:
        assert encoded == once, "every frame is encoded once, by one rank"
    else:
        assert once < encoded <= 2 * once, "frames without kept activations are encoded again in the backward pass"
    if row.experts or row.specialists:
        balanced_by_loss = row.specialists.get("balance") != "bias"
        for got, want in zip(results[0]["moe"], reference["moe"], strict=True):
            assert got == pytest.approx(want, rel=TOLERANCE)
            assert set(got) == ({"load_balancing_loss", "z_loss"} if balanced_by_loss else {"z_loss"})
        # Before rounding differs in the weights, every token goes where one process sends it.
        assert np.array_equal(results[0]["routing"][0], reference["routing"][0])
    # A job of this layout holds what preflight says: the two ends of the pipeline, byte by byte.
    for rank in sorted({0, row.ranks - 1}):
        with built_rank(job_of(row), rank, row.ranks) as built:
            assert held_by(built.model, built.optimizer) == results[rank]["held"]


@pytest.mark.parametrize(
    ("experts", "golden"),
    [(0, (5.552358107, 5.557490524, 5.490022379)), (4, (5.526224726, 5.571559236, 5.492324142))],
    ids=["dense", "MoE"],
)
def test_losses_are_the_ones_on_record(experts: int, golden: tuple[float, ...], references: References) -> None:
    """A change that is not meant to change the numbers does not: initial weights, data, loss and optimizer."""
    result, _ = references.of(Row("one process", 1, experts=experts))
    # Machines differ in the order of their sums, which three steps of Adam at 1e-2 amplify.
    assert result["losses"] == pytest.approx(golden, rel=1e-5)


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference, relative to the largest gradient of the tensor."""
    largest = np.abs(want).max()
    return float(np.abs(got - want).max() / largest) if largest else float(np.abs(got).max())


def _page(rows: list[str]) -> str:
    return (
        f"""# Parity of parallel layouts

Every layout trains the same tiny InternVL on the same batches, which mix many-frame, one-frame and text-only
samples, for three steps in fp32 on CPU ranks over gloo (a {len(os.sched_getaffinity(0))}-core {platform.machine()}
machine). It has to give one process's numbers: the losses, the
norm of the gradient over all parameters, and the gradient of every parameter, gathered from its shards.

Written by `make parity` on {datetime.date.today():%Y-%m-%d}: Python {platform.python_version()}, torch
{torch.__version__.split("+")[0]}, megatron-core {megatron.core.__version__}.

- **loss**: largest relative difference of the three losses.
- **gradient**: largest difference of any element of any parameter's gradient, relative to the largest gradient
  of that parameter. The bar is {TOLERANCE:.0e}.
- **norm**: largest relative difference of the gradient norm.
- **frames**: frames encoded, summed over all ranks, relative to the frames of the batch. 1.00: nobody encodes a
  frame twice. Where frames in flight are bounded, the others are encoded again in the backward pass.

SP is sequence parallelism; CP is ring attention over context ranks, Ulysses their all-to-all over heads; ETP is
experts split by tensor parallelism. MoE rows have 4 experts with load-balancing loss and z-loss. Specialists are
three pools of 4 experts, called by the documents' specialties; routers, priors and auxiliary losses are in what is
compared, and in the first step the choice of every expert.

| layout | ranks | loss | gradient | norm | frames |
|---|---|---|---|---|---|
"""
        + "\n".join(rows)
        + "\n"
    )
