"""Slow ranks are named: by what they take for a frame, and by how long they wait for data."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megamed.runtime import ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, Stragglers, build_job, fit
from megamed.train.stragglers import compare

STEPS, EVERY = 4, 2


def _train(path: Path, slow: str) -> None:
    config = JobConfig()
    config.model, config.parallel = tiny_vlm(), ParallelConfig(context=2)
    config.attention.ulysses, config.data.seq_length = 1, 64
    config.train.steps, config.train.microbatches, config.train.straggler_steps = STEPS, 2, EVERY
    config.validate(2)
    mesh = build_mesh(config.parallel, config.ulysses, config.document_multiple)
    seed_everything(1, mesh.data_rank)
    job, source = build_job(config, mesh), SyntheticSource(64, plan=((2, 3), (4,)))
    is_slow = mesh.context_rank == 1
    encoder, load = job.phase.passes.encoder, source.load_frames

    def encode(pixels: torch.Tensor) -> Any:
        # Both sleep for much longer than it takes to encode a frame on a machine that does other things.
        time.sleep(0.1 * len(pixels) * (3 if is_slow and slow == "encoder" else 1))
        return encoder(pixels)

    def load_slowly(frames: Any) -> Any:
        time.sleep(1.0 if is_slow and slow == "data" else 0.0)
        return load(frames)

    job.phase.passes.encoder = encode
    source.load_frames = load_slowly  # type: ignore[method-assign]
    fit(job, source, [Stragglers(path, config, job.phase)], 0)


@pytest.mark.parametrize(("slow", "said"), [("encoder", "encodes a frame in "), ("data", "waits for data for ")])
def test_the_slow_rank_is_named(slow: str, said: str, ranks: Any, tmp_path: Path) -> None:
    path = tmp_path / "stragglers.jsonl"
    ranks.run(_train, 2, path, slow)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and all(line["steps"] == EVERY for line in lines)
    for line in lines:
        assert {entry["rank"] for entry in line["slow"]} == {1}, line
        assert line["slow"][0]["what"].startswith(said) and line["slow"][0]["node"]


def test_who_is_slow() -> None:
    quiet = compare([1.0, 1.1, 1.0, 0.0], [10, 10, 10, 0], [0.1, 0.2, 0.1, 0.1], [10] * 4)
    assert quiet == {"encode_seconds": [0.1, 0.11], "data_share": [0.01, 0.02], "slow": []}
    # More frames are no slowness; a rank without any has nothing to be judged by.
    assert compare([1.0, 3.0, 0.0], [10, 30, 0], [0] * 3, [10] * 3)["slow"] == []
    assert compare([0.0, 0.0], [0, 0], [0, 0], [1, 1])["encode_seconds"] == [0.0, 0.0]
    assert [x["rank"] for x in compare([1.0, 1.0, 1.3], [10] * 3, [0] * 3, [10] * 3)["slow"]] == [2]
    # That all of them wait is for another report to say.
    assert compare([1.0] * 3, [10] * 3, [3.0] * 3, [10] * 3)["slow"] == []
    (entry,) = compare([1.0] * 3, [10] * 3, [0.1, 0.1, 2.0], [10] * 3)["slow"]
    assert entry == {"rank": 2, "what": "waits for data for 20% of its time, others for 1%"}
