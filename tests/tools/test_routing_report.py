"""tools/routing_report.py: known numbers from a routing.jsonl made by hand, the heat map, errors, and a real run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamed.models.moe import Pools
from megamed.utils import UserError
from tests.launch.command import SMALL, run
from tools.routing_report import draw, find, numbers, on_ranks, read, tables

SIZES = {"general": 2, "chest": 4, "neuro": 2}
POOLS = Pools(SIZES)


def window(step: int, steps: int = 50, scale: int = 1, **changes: Any) -> dict[str, Any]:
    """Layers 2 and 3: in 2 the chest pool is even, in 3 one of its experts has half of the pool's choices."""
    picks = np.zeros((2, 4, 8), np.int64)
    chest, general, neuro = (list(POOLS.members[name]) for name in ("chest", "general", "neuro"))
    picks[0, 0, chest] = 20
    picks[1, 0, chest] = [10, 20, 10, 0]
    picks[1, 0, general] = 20
    picks[:, 1, neuro] = 10
    picks[:, 1, general] = [25, 5]
    picks[:, 2] = 1
    picks[:, 3] = picks[:, :3].sum(1)
    return {
        "step": step, "steps": steps, "layers": [2, 3], "pools": SIZES, "rows": ["chest", "neuro", "none", "all"],
        "expert_parallel": 2, "entropy": [1.0 * scale, 2.0], "picks": (picks * scale).tolist(), **changes,
    }  # fmt: skip


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "routing.jsonl", window(50), window(100, scale=3), window(110, steps=10))


def test_numbers_of_one_window(path: Path) -> None:
    facts = numbers(read(path, None, None, 10))
    assert facts["steps"] == [101, 110] and facts["windows"] == 1
    chest = facts["rows"]["chest"]
    assert chest["choices"] == 160
    assert chest["shares"] == {"general": 0.25, "chest": 0.75, "neuro": 0.0}
    by_name = dict(zip(facts["experts"], chest["by_expert"], strict=True))
    assert by_name["chest 1"] == 40 / 160 and by_name["chest 3"] == 20 / 160 and by_name["general 1"] == 20 / 160
    assert facts["rows"]["none"]["shares"] == {"general": 0.25, "chest": 0.5, "neuro": 0.25}
    pool = facts["pools"]["chest"]
    # With one choice each of the tokens without specialties: 11, 21, 11 and 1 of 44 in layer 3.
    assert pool["busiest"] == {"expert": 1, "layer": 3, "load": round(21 / 11, 6)}
    assert pool["idlest"] == {"expert": 3, "layer": 3, "load": round(1 / 11, 6)}
    shares = np.array([11, 21, 11, 1]) / 44
    assert pool["entropy"] == pytest.approx((np.log(4) - (shares * np.log(shares)).sum()) / 2, abs=1e-6)
    first, second = facts["layers"]
    # Numbers are rounded to six places.
    assert first["match"] == round((80 + 20) / (80 + 50), 6) and second["match"] == round(60 / 130, 6)
    assert second["own_pool"] == {"chest": 0.5, "neuro": 0.4}
    # Rank 0 has the first half of each pool: 26 + 42 + 11 and 46 + 32 + 11 of 138.
    assert (first["busiest_rank"], first["load"]) == (0, round(79 / 69, 6))
    assert (second["busiest_rank"], second["load"]) == (0, round(89 / 69, 6))


def test_a_batch_of_one_specialty_on_ranks(path: Path) -> None:
    routing = read(path, None, None, 10)
    loads = numbers(routing)["one_specialty"]
    # Half of each pool on rank 0: 40 of 80, and 20 + 10 + 20 of 80. One pool after the other it has all of general and
    # half of chest: 40 of 80, and 40 + 10 + 20 of 80. A load is relative to the mean, 40.
    assert loads["chest"] == {"spread": (1.0 + 1.25) / 2, "together": (1.0 + 1.75) / 2}
    assert numbers(on_ranks(routing, 1))["one_specialty"]["neuro"] == {"spread": 1.0, "together": 1.0}
    assert "a batch of" in tables(routing) and "a batch of" not in tables(on_ranks(routing, 1))
    with pytest.raises(UserError, match="--ranks 4 does not divide the 2 experts of pool general"):
        on_ranks(routing, 4)


def test_windows_that_overlap_are_summed(path: Path) -> None:
    for (first, to, last), windows, scale in [
        ((None, None, None), 3, 5), ((None, 50, None), 1, 1), ((51, 100, None), 1, 3), ((50, 51, None), 2, 4),
        ((None, None, 11), 2, 4), ((None, None, 500), 3, 5), ((101, None, None), 1, 1),
    ]:  # fmt: skip
        routing = read(path, first, to, last)
        assert (routing.num_windows, routing.picks_LRE[1, 0, 1]) == (windows, 10 * scale), (first, to, last)
    # Tokens count, not windows: 3 of the 5 parts have an entropy of 3 in the first layer.
    assert read(path, None, None, None).entropy_L.tolist() == pytest.approx([(1 + 3 * 3 + 1) / 5, 2.0])


def test_the_table(path: Path) -> None:
    text = tables(read(path, None, None, 10))
    lines = [line.split() for line in text.splitlines()]
    assert ["specialty", "general", "chest", "neuro", "choices"] in lines
    assert ["chest", "25.0%", "75.0%", "0.0%", "160"] in lines
    assert ["neuro", "60.0%", "0.0%", "40.0%", "100"] in lines
    assert "chest 4 1.91 (expert 1, layer 3) 0.09 (expert 3, layer 3) 1.26 of 1.39".split() in lines
    assert "3 2.00 46.2% 1.29 (rank 0)".split() in lines
    assert "worst 46.2% 1.29".split() in lines


def test_one_rank_has_no_column_and_an_unused_pool_no_load(tmp_path: Path) -> None:
    line = window(50, expert_parallel=1)
    picks = np.array(line["picks"])
    picks[..., list(POOLS.members["neuro"])] = 0
    picks[:, 1] = 0
    text = tables(read(write(tmp_path / "r.jsonl", {**line, "picks": picks.tolist()}), None, None, None))
    assert "rank" not in text
    assert re.search(r"neuro +2 +not used\n", text) and re.search(r"neuro +- +- +- +0\n", text)


@pytest.mark.parametrize(
    ("sizes", "num_layers"),
    [(SIZES, 2), ({"general": 40, **{f"pool{i}": 32 for i in range(5)}}, 48), ({"general": 8}, 1)],
)
def test_the_heat_map_is_not_blank(tmp_path: Path, sizes: dict[str, int], num_layers: int) -> None:
    image = pytest.importorskip("matplotlib.image")
    pools = Pools(sizes)
    rows = [*pools.specialties, "none", "all"]
    picks = np.ones((num_layers, len(rows), pools.num_experts), np.int64)
    for row, name in enumerate(pools.specialties):
        picks[:, row, list(pools.members[name])] = 9
    line = {
        "step": 1, "steps": 1, "layers": list(range(1, num_layers + 1)), "pools": sizes, "rows": rows,
        "expert_parallel": 1, "entropy": [0.5] * num_layers, "picks": picks.tolist(),
    }  # fmt: skip
    png = tmp_path / "map.png"
    draw(read(write(tmp_path / "routing.jsonl", line), None, None, None), png)
    pixels = image.imread(png)[..., :3]
    # viridis: its yellow end is the largest share, its blue and green are what lies below.
    yellow = (pixels[..., 0] > 0.9) & (pixels[..., 1] > 0.8) & (pixels[..., 2] < 0.3)
    dark = (pixels.max(-1) < 0.65) & (np.ptp(pixels, axis=-1) > 0.1)
    assert yellow.mean() > 0.02
    assert dark.mean() > 0.1 or len(sizes) == 1
    assert 150 < pixels.shape[0] < 2500 and 700 < pixels.shape[1] < 2500
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_runs_without_routing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such run"):
        find(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no folder of a run"):
        find(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {language: {moe: {num_experts: 0, pools: {}}}}\n")
    with pytest.raises(UserError, match="the model of this run is dense"):
        find(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {language: {moe: {num_experts: 4, pools: {}}}}\n")
    with pytest.raises(UserError, match="has not begun"):
        find(tmp_path)
    (tmp_path / "routing.jsonl").write_text("")
    with pytest.raises(UserError, match="no window of steps yet"):
        read(find(tmp_path), None, None, 500)


@pytest.mark.parametrize(
    "damaged",
    [
        '{"step": 100, "steps": 5',
        "\x00\x00",
        "17",
        json.dumps(window(100, rows=["chest", "none", "all"])),
        json.dumps(window(100, entropy=[1.0])),
        json.dumps(window(100, pools={"general": 2, "chest": 4})),
        json.dumps(window(100, pools=8)),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "routing.jsonl"
    text = [json.dumps(window(step)) for step in (50, 150)]
    path.write_text("\n".join([text[0], damaged, text[1], ""]))
    with pytest.raises(UserError, match=r"routing.jsonl: line 2 is damaged \(.*remove it"):
        read(path, None, None, 500)


def test_a_line_that_is_being_written_is_left_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(window(160))[:-20])
    assert read(path, None, None, 10).last == 110
    assert "line 4" in capsys.readouterr().err


def test_experts_that_changed_are_named_unless_nobody_asks(tmp_path: Path) -> None:
    fewer = Pools({"general": 2, "chest": 4})
    other = window(
        100, pools=dict(fewer.sizes), rows=["chest", "none", "all"], picks=np.ones((2, 3, 6), int).tolist()
    )
    path = write(tmp_path / "routing.jsonl", window(50), other)
    with pytest.raises(UserError, match=r"between steps 50 \(general 2, chest 4, neuro 2 .*--from 51 or --to 50"):
        read(path, None, None, None)
    assert read(path, 51, None, None).pools == fewer
    assert read(path, None, 50, None).pools == POOLS
    with pytest.raises(UserError, match=r"no window in steps 101 to 200; its last step is 100"):
        read(path, 101, 200, None)


def test_a_real_run(tmp_path: Path) -> None:
    """The file that training writes is the one that the report reads, and metrics.jsonl has its numbers."""
    moe = "model.language.moe"
    code, output = run(
        tmp_path / "log", *SMALL, f"run.dir={tmp_path}/runs", "train.steps=3", f"{moe}.log_every=2",
        "model/moe=specialists", f"{moe}.routing=hard", f"{moe}.intermediate_size=16",
    )  # fmt: skip
    assert code == 0, output
    folder = tmp_path / "runs" / "fmri"
    routing = read(find(folder), None, None, None)
    assert (routing.first, routing.last, routing.num_windows, routing.layers) == (1, 3, 2, (1, 2))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    choices = sum(line["tokens"] for line in lines) * 2 * 2  # top-2 in two layers
    assert numbers(routing)["rows"]["all"]["choices"] == choices
    shares = [line["moe/pool_neuro"] * line["tokens"] for line in lines]
    expected = sum(shares) / sum(line["tokens"] for line in lines)
    assert numbers(routing)["rows"]["all"]["shares"]["neuro"] == pytest.approx(expected, abs=2e-6)
