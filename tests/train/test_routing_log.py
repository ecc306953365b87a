"""routing.jsonl: windows, a resumed run, damaged lines; and what a step reports of its routing."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megamed.models.moe import PoolConfig, Pools, RoutingCounts
from megamed.models.moe.report import routing_metrics
from megamed.testing.tiny import tiny_vlm
from megamed.train import JobConfig, RoutingLog

SIZES = {"general": 2, "chest": 4, "neuro": 2}
LAYERS, ROWS, EXPERTS = 3, 4, 8


@pytest.fixture
def rank_0() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def job_config(log_every: int = 4, checkpoint_every: int = 0, steps: int = 11) -> JobConfig:
    config = JobConfig()
    config.model = tiny_vlm()
    moe = config.model.language.moe
    moe.pools = {name: PoolConfig(size) for name, size in SIZES.items()}
    moe.log_every, moe.first_dense_layers = log_every, 1
    config.parallel.expert = 2
    config.checkpoint.every_steps, config.train.steps = checkpoint_every, steps
    return config


def counts(step: int) -> RoutingCounts:
    """Different in every place and every step."""
    picks = np.arange(LAYERS * ROWS * EXPERTS).reshape(LAYERS, ROWS, EXPERTS) * step
    return RoutingCounts(picks, np.array([1.0, 2.0, 3.0]) / step)


def train(path: Path, config: JobConfig, first: int, last: int) -> None:
    """Steps first + 1 to last of a run, which then is killed unless it is at its end."""
    log = RoutingLog(path, config)
    log.start(first)
    for step in range(first + 1, last + 1):
        event: Any = SimpleNamespace(step=step, report=SimpleNamespace(routing=counts(step)))
        log.after_step(event)
    if last == config.train.steps:
        log.end()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_windows_hold_every_step_once(rank_0: None, tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    train(path, job_config(), 0, 11)
    written = lines(path)
    assert [(line["step"], line["steps"]) for line in written] == [(4, 4), (8, 4), (11, 3)]
    first = written[0]
    assert first["layers"] == [2, 3, 4] and first["pools"] == SIZES and first["expert_parallel"] == 2
    assert first["rows"] == ["chest", "neuro", "none", "all"]
    assert first["picks"] == (counts(1).picks * (1 + 2 + 3 + 4)).tolist()
    # Step s has s times the tokens of step 1, and 1 / s of its entropy: a mean over steps alone would differ.
    assert first["entropy"] == pytest.approx([0.4, 0.8, 1.2])


@pytest.mark.parametrize(("checkpoint", "killed_after"), [(6, 7), (6, 9), (4, 5), (3, 10), (9, 9)])
def test_a_resumed_run_loses_and_doubles_no_step(
    rank_0: None, tmp_path: Path, checkpoint: int, killed_after: int
) -> None:
    path, config = tmp_path / "routing.jsonl", job_config(checkpoint_every=3)
    if checkpoint % 3:
        config.checkpoint.every_steps = checkpoint
    train(path, config, 0, killed_after)
    train(path, config, checkpoint, 11)
    written = lines(path)
    ends = [line["step"] for line in written]
    assert ends == sorted(set(ends)) and ends[-1] == 11
    assert [line["steps"] for line in written] == np.diff([0, *ends]).tolist()
    assert np.sum([line["picks"] for line in written], axis=0).tolist() == (counts(1).picks * 66).tolist()


def test_a_resumed_run_drops_damaged_lines(rank_0: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, config = tmp_path / "routing.jsonl", job_config()
    train(path, config, 0, 8)
    good = path.read_bytes()
    no_end = good.splitlines()[0]
    path.write_bytes(b'{"steps": 3}\n7\n\xff\xfe\n' + good + no_end[:100] + b"\n" + no_end)
    train(path, config, 8, 11)
    assert [line["step"] for line in lines(path)] == [4, 8, 11]
    assert caplog.text.count("cut short is dropped") == 5


def test_a_dense_model_has_no_file(rank_0: None, tmp_path: Path) -> None:
    path, config = tmp_path / "routing.jsonl", job_config()
    config.model = tiny_vlm()
    path.write_text("of an earlier run that had experts\n")
    log = RoutingLog(path, config)
    log.start(0)
    event: Any = SimpleNamespace(step=11, report=SimpleNamespace(routing=None))
    log.after_step(event)
    log.end()
    assert not path.exists()


def test_a_steps_metrics() -> None:
    pools = Pools(SIZES)
    # One layer is even, in the other each number is chosen so that every metric differs.
    members = pools.members
    picks = np.zeros((2, ROWS, EXPERTS), np.int64)
    chest, neuro, none, total = range(ROWS)
    picks[0, chest, members["chest"]] = 10
    picks[0, none] = 10
    picks[1, chest, members["chest"]] = [30, 10, 0, 0]
    picks[1, chest, members["general"]] = 20
    picks[1, neuro, members["neuro"]] = [12, 8]
    picks[1, neuro, members["chest"]] = [5, 0, 0, 0]
    picks[:, total] = picks[:, :total].sum(1)
    # A token of both specialties chose two experts of chest: it is in both rows, and once in the last.
    picks[1, [chest, neuro, total], members["chest"][1]] += 2
    got = routing_metrics(RoutingCounts(picks, np.array([1.0, 2.0])), pools, 2)
    everything = 120 + 107
    assert got == pytest.approx(
        {
            "moe/pool_general": (20 + 40) / everything,
            "moe/pool_chest": (80 + 47) / everything,
            "moe/pool_neuro": (20 + 20) / everything,
            "moe/entropy": 1.5,
            "moe/busiest_rank": rank_load(picks[1, total], pools),
            "moe/busiest_expert": 35 / ((35 + 12) / 4),
            "moe/match": (40 + 42 + 20) / (40 + 107),
        },
        abs=1e-6,  # they are rounded to six places
    )
    picks[:, total] = picks[:, none]
    picks[:, :none] = 0
    assert "moe/match" not in routing_metrics(RoutingCounts(picks, np.zeros(2)), pools, 1)


def rank_load(picks_E: np.ndarray, pools: Pools) -> float:
    """By the names of the experts: a rank of two holds the first or the second half of every pool."""
    halves = [0, 0]
    for (name, i), number in zip(pools.order, picks_E.tolist(), strict=True):
        halves[i * 2 // pools.sizes[name]] += number
    return max(halves) / (sum(halves) / 2)


def test_a_plain_mixture_has_one_pool() -> None:
    picks = np.array([[[3, 1], [3, 1]]])
    got = routing_metrics(RoutingCounts(picks, np.array([0.5])), Pools({"general": 2}), 2)
    assert got == {"moe/pool_general": 1.0, "moe/entropy": 0.5, "moe/busiest_rank": 1.5, "moe/busiest_expert": 1.5}
