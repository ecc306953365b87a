"""Some pools of a model as a model of their own: the same logits, at any layout, in proportion less on disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megamed.checkpoint import model_of
from megamed.config import load
from megamed.models.moe import MoEConfig
from megamed.models.vlm import VLMConfig
from tests.checkpoint.small_models import dense, logits, save, specialists
from tests.launch.command import run

TOOL = Path(__file__).resolve().parents[2] / "tools" / "extract_specialist.py"
SIZES = {"general": 2, "chest": 4, "neuro": 2, "breast": 2}
OPTIONS = {"shared_intermediate_size": 32, "balance": "bias", "score_function": "sigmoid", "first_dense_layers": 1}


def whole(**moe: Any) -> VLMConfig:
    return specialists(SIZES, **{**OPTIONS, **moe})


@pytest.fixture(scope="module")
def runs(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    ranks.run(save, 1, whole(routing="soft"), str(folder / "moe"), 5)
    return folder


def extract(log: Path, *args: object) -> tuple[int, str]:
    return run(log, *map(str, args), script=TOOL)


def extracted(checkpoint: Path, **moe: Any) -> VLMConfig:
    """The model of a new checkpoint, with its moe.yaml."""
    config = model_of(checkpoint)
    settings = load(MoEConfig, yaml.safe_load((checkpoint / "moe.yaml").read_text()))
    return replace(config, language=replace(config.language, moe=replace(settings, **moe)))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


@pytest.mark.parametrize(
    ("pools", "called", "expert"),
    # Bits of the whole model's specialties: chest 1, neuro 2, breast 4; and of what is left of them.
    [(("neuro",), (2, 1), 1), (("breast", "chest"), (5, 3), 2)],
    ids=["one pool", "two pools, at EP2"],
)
def test_logits_are_those_of_the_whole_model_with_hard_routing(
    pools: tuple[str, ...], called: tuple[int, int], expert: int, runs: Path, ranks: Any, tmp_path: Path
) -> None:
    code, output = extract(tmp_path / "log", runs / "moe", "--pools", *pools, "--to", tmp_path / "part")
    assert code == 0, output
    want = ranks.run(logits, 1, whole(routing="hard"), str(runs / "moe"), (called[0],), {})[0]
    config = extracted(tmp_path / "part")
    assert config.language.moe.routing == "hard"
    results = ranks.run(logits, expert, config, str(tmp_path / "part"), (called[1],), {"expert": expert})
    for got in results:
        # fp32 sums of the same terms; products of matrices of other sizes may take them in another order.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    other = ranks.run(logits, 1, whole(routing="hard"), str(runs / "moe"), (7 - called[0],), {})[0]
    assert np.abs(other - want).max() > 1e-2, "it matters which pools are called"


def test_priors_of_what_is_kept_stay_as_they_were(runs: Path, ranks: Any, tmp_path: Path) -> None:
    """With soft routing, all pools kept in their order is the whole model."""
    names = [name for name in SIZES if name != "general"]
    code, output = extract(tmp_path / "log", runs / "moe", "--pools", *names, "--to", tmp_path / "all")
    assert code == 0, output
    want = ranks.run(logits, 1, whole(routing="soft"), str(runs / "moe"), (1, 6), {})[0]
    got = ranks.run(logits, 1, extracted(tmp_path / "all", routing="soft"), str(tmp_path / "all"), (1, 6), {})[0]
    assert np.array_equal(got, want)


def test_a_part_takes_the_part_of_the_disk(runs: Path, tmp_path: Path) -> None:
    for name, pools in (("all", ("chest", "neuro", "breast")), ("six", ("chest",)), ("four", ("neuro",))):
        code, output = extract(tmp_path / "log", runs / "moe", "--pools", *pools, "--to", tmp_path / name)
        assert code == 0, output
    # An expert of the one layer that has some; torch has some 1,500 bytes of its own around each of five records.
    expert = 3 * 64 * 96 * 4
    per_expert = (size(tmp_path / "all") - size(tmp_path / "four")) / (10 - 4)
    assert expert < per_expert < 1.12 * expert
    assert size(tmp_path / "six") - size(tmp_path / "four") == pytest.approx(2 * per_expert, rel=0.01)


@pytest.mark.parametrize(
    ("source", "pools", "message"),
    [
        ("moe", ("chset",), "there is no pool chset; did you mean chest?"),
        ("moe", ("knee",), "there is no pool knee; there are: general, chest, neuro, breast"),
        ("moe", ("chest", "chest"), "pool chest is named twice"),
        ("plain", ("chest",), "its 4 experts are in no pools, so none can be taken out"),
        ("dense", ("chest",), "it has no experts, so none can be taken out"),
        ("few", ("a",), "--pools a: 1 experts would be left, and tokens are sent to top_k=2; keep further pools (b)"),
        ("nowhere", ("a",), "nowhere: is no folder"),
    ],
)
def test_what_cannot_be_taken_out_is_said(
    source: str, pools: tuple[str, ...], message: str, runs: Path, others: None, tmp_path: Path
) -> None:
    code, output = extract(tmp_path / "log", runs / source, "--pools", *pools, "--to", tmp_path / "new")
    assert code == 2 and "Traceback" not in output, output
    assert message in output and output.count("megamed: error") == 1, output
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def others(runs: Path, ranks: Any) -> None:
    """Models that nothing can be taken out of."""
    plain, few = specialists({}, num_experts=4), specialists({"a": 1, "b": 1})
    for name, config in (("plain", plain), ("dense", dense()), ("few", few)):
        ranks.run(save, 1, config, str(runs / name), 1)
