"""Training on a volume store: packing changes nothing but the speed, and a run goes on where it was at any layout."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megamed.checkpoint import CheckpointManager, list_checkpoints
from megamed.data import Microbatch, StudySource, pack
from megamed.models.language import AttentionConfig
from megamed.optim import OptimConfig
from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.tiny import tiny_vlm
from megamed.testing.whole import merge, shards
from megamed.train import Checkpoints, JobConfig, build_job, fit
from tests.data.stream.studies import TOKENIZER, config, make_samples, make_store, source

ROWS = 4
# Relative to the tensor's largest gradient, as for layouts. fp32 has 1.2e-7; sums over a few hundred terms in another
# order spread that by one or two digits.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    make_store(folder / "store")
    make_samples(folder / "talk.jsonl")
    return folder


def make(folder: Path, steps: int = 6, **parallel: Any) -> tuple[Any, StudySource]:
    settings = JobConfig()
    settings.model = tiny_vlm(vocab_size=264)
    settings.model.frames_per_pass = 3
    settings.parallel = ParallelConfig(**parallel)
    settings.attention = AttentionConfig(ulysses=1)
    settings.optim = OptimConfig(lr=1e-3, warmup_steps=1)
    settings.data = config(folder / "store", folder / "talk.jsonl")
    settings.data.loader.prefetch_frames = 16
    settings.data.frames.augment.enabled = True
    settings.train.steps, settings.train.microbatches = steps, ROWS
    mesh = build_mesh(settings.parallel, settings.ulysses)
    seed_everything(1, mesh.data_rank)
    return build_job(settings, mesh), source(settings.data)


def rows_of(made: StudySource, packed: bool) -> list[Microbatch]:
    """The first rows, or the same samples each in a row of its own."""
    if packed:
        return [made.microbatch(index) for index in range(ROWS)]
    documents = [made._document(pick) for index in range(ROWS) for pick in made.planned(index).picks]
    return [pack([document], 512, TOKENIZER.pad_id) for document in documents]


def gradients(folder: Path, packed: bool, parallel: dict[str, Any]) -> tuple[Any, Any]:
    job, made = make(folder, **parallel)
    rows = rows_of(made, packed)[job.mesh.data_rank :: job.mesh.data_size]
    report = job.stepper.gradients(rows, made.load_frames)
    return report, shards(job.model, gradients=True)


@pytest.fixture(scope="module")
def unpacked(ranks: Any, folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    report, found = ranks.run(gradients, 1, folder, False, {})[0]
    return report, merge([found])


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(1, {}), (2, {}), (2, {"context": 2}), (4, {"tensor": 2, "pipeline": 2})],
    ids=["one process", "DP2", "CP2", "TP2 x PP2"],
)
def test_packed_rows_give_the_gradients_of_their_samples(
    num_ranks: int, parallel: dict[str, Any], ranks: Any, folder: Path, unpacked: Any
) -> None:
    expected, whole = unpacked
    results = ranks.run(gradients, num_ranks, folder, True, parallel)
    found = merge([shard for _, shard in results])
    for report, _ in results:
        assert report.loss == pytest.approx(expected.loss, rel=TOLERANCE)
        assert report.loss_by_kind == pytest.approx(expected.loss_by_kind, rel=TOLERANCE)
        for name in ("num_tokens", "num_labels", "num_frames", "num_encoded"):
            assert getattr(report, name) == getattr(expected, name)
    assert expected.num_frames > 10
    errors = {name: np.abs(found[name] - want).max() / (np.abs(want).max() or 1.0) for name, want in whole.items()}
    assert found.keys() == whole.keys() and max(errors.values()) <= TOLERANCE, max(errors, key=errors.__getitem__)


class Watch:
    """A source that keeps which samples and pixels each step of this rank had."""

    def __init__(self, made: StudySource):
        self.made, self.samples, self.pixels = made, {}, {}  # type: ignore[var-annotated]
        self.loaded: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def microbatch(self, index: int) -> Microbatch:
        row = self.made.microbatch(index)
        self.samples[index] = row.sample_ids
        return row

    def load_frames(self, frames: Sequence[Any]) -> Any:
        pixels = self.made.load_frames(frames)
        self.loaded += frames
        for frame, one in zip(frames, pixels.numpy(), strict=True):
            self.pixels[frame] = hashlib.sha256(one.tobytes()).hexdigest()
        return pixels


def trained(folder: Path, saves: Path, steps: int, parallel: dict[str, Any]) -> dict[str, Any]:
    """Go on from the last checkpoint, if there is one, to step `steps`."""
    job, made = make(folder, **parallel)
    watch, seen = Watch(made), []
    parts = (job.config.checkpoint, job.model, job.optimizer, job.scheduler)
    layout = {**vars(job.config.parallel), "data": job.mesh.data_size}
    manager = CheckpointManager(saves, *parts, job.mesh, {"model": {}, "layout": layout, "optimizer": {}})
    found = list_checkpoints(saves)
    card = manager.load(found[-1]) if found else {"step": 0, "position": 0, "data": {}}
    made.restore(card["position"], card["data"])
    job.config.train.steps = steps

    class Keep:
        def start(self, step: int) -> None: ...
        def after_step(self, event: Any) -> None:
            seen.append((event.step, event.position, event.report.loss))

        def end(self) -> None: ...

    fit(job, watch, [Keep(), Checkpoints(manager, watch, 0, steps)], card["step"], card["position"])
    dist.barrier()
    return {
        "seen": seen, "samples": watch.samples, "pixels": watch.pixels, "loaded": watch.loaded,
        "replica": job.mesh.data_rank,
    }


def test_a_run_goes_on_at_another_number_of_replicas(ranks: Any, folder: Path, tmp_path: Path) -> None:
    whole = ranks.run(trained, 1, folder, tmp_path / "whole", 6, {})[0]
    samples, pixels, losses = {}, {}, []  # type: ignore[var-annotated]
    for num_ranks, steps in ((1, 2), (2, 4), (4, 6)):
        results = ranks.run(trained, num_ranks, folder, tmp_path / "parts", steps, {})
        rows = [index for result in results for index in result["samples"]]
        assert sorted(rows) == list(range((steps - 2) * ROWS, steps * ROWS))  # each row to one replica
        assert {len(result["samples"]) for result in results} == {2 * ROWS // num_ranks}
        for result in results:
            samples |= result["samples"]
            pixels |= result["pixels"]
        losses += results[0]["seen"]
    assert samples == whole["samples"] and pixels == whole["pixels"]
    assert [(step, position) for step, position, _ in losses] == [(s, s * ROWS) for s in range(1, 7)]
    # Replicas add up their gradients in another order; six steps of Adam keep that small.
    assert [loss for *_, loss in losses] == pytest.approx([loss for *_, loss in whole["seen"]], rel=1e-4)


def test_each_rank_loads_its_own_frames_and_each_frame_is_loaded_once(
    ranks: Any, folder: Path, tmp_path: Path
) -> None:
    results = ranks.run(trained, 4, folder, tmp_path, 3, {"pipeline": 2})
    everywhere = Counter(frame for result in results for frame in result["loaded"])
    made = source(config(folder / "store", folder / "talk.jsonl"))
    wanted = Counter(frame for index in range(3 * ROWS) for frame in made.microbatch(index).frames)
    assert everywhere == wanted and len(wanted) > 40
    for replica in (0, 1):
        counts = [len(result["loaded"]) for result in results if result["replica"] == replica]
        assert len(counts) == 2 and max(counts) - min(counts) <= 3  # one frame a step
