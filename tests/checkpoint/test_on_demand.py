"""Specialists in memory when they are called: the same logits, memory in proportion, nothing else read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamed.checkpoint import find_checkpoint
from megamed.checkpoint.on_demand import SpecialistLoader
from megamed.checkpoint.weights import Weights
from megamed.models.vlm import VLMConfig
from megamed.parallel import VisionPhase, run_schedule
from megamed.runtime import Mesh, ParallelConfig, build_mesh, seed_everything
from megamed.testing.synthetic import SyntheticSource
from megamed.utils import UserError
from tests.checkpoint.small_models import SEQ_LENGTH, dense, logits, save, specialists

SIZES = {"general": 2, "chest": 4, "neuro": 2, "breast": 2}
EXPERT = 2 * 3 * 64 * 96 * 4  # bytes of one in two layers, fp32
CHEST, NEURO, BREAST = 1, 2, 4


def whole(**moe: Any) -> VLMConfig:
    return specialists(SIZES, shared_intermediate_size=32, **moe)


@pytest.fixture(scope="module")
def checkpoint(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    ranks.run(save, 1, whole(routing="soft", balance="bias"), str(folder), 5)
    return str(find_checkpoint(folder, ""))


@dataclass
class Loaded:
    """A loader, and what computes with it."""

    loader: SpecialistLoader
    mesh: Mesh

    def logits(self, called: tuple[int, ...]) -> np.ndarray:
        """As `small_models.logits`."""
        source = SyntheticSource(SEQ_LENGTH, specialties=(called,))
        microbatches = [source.microbatch(i) for i in range(2)]
        encoder = self.loader.vision
        phase = VisionPhase(encoder, self.mesh, 4, 64, torch.float32, frames_per_pass=8, frames_in_flight=None)
        with torch.no_grad():
            rows = phase.forward(microbatches, source.load_frames, keep_graph=False)
            inputs = phase.language_inputs(microbatches, rows)
            found = run_schedule(
                self.loader.language, inputs, lambda output, item: (output.new_zeros(()), output[0]), False, train=False
            )
        real = [m.padding_S.logical_not() for m in microbatches]
        return np.concatenate([x_SV[keep, :250].numpy() for x_SV, keep in zip(found, real, strict=True)])

    def bytes_in_memory(self) -> int:
        """Of all parameters and buffers, each storage once."""
        tensors = [t for part in self.loader.parts for t in (*part.parameters(), *part.buffers())]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def load(checkpoint: str, layout: dict[str, Any], **bounds: int) -> Loaded:
    mesh = build_mesh(ParallelConfig(**layout))
    seed_everything(1, mesh.data_rank)
    return Loaded(SpecialistLoader(Path(checkpoint), mesh, **bounds), mesh)  # type: ignore[arg-type]


def refused(action: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as error:
        action(*arguments)
    return str(error.value)


def go_through(checkpoint: str, layout: dict[str, Any]) -> dict[str, Any]:
    """What a rank sees while pools come and go."""
    loaded = load(checkpoint, layout, most_pools=2)
    loader = loaded.loader
    found: dict[str, Any] = {"none": loaded.bytes_in_memory()}
    loader.call({"chest"})
    found["chest"] = (loaded.logits((CHEST,)), loaded.bytes_in_memory(), loader.resident_bytes)
    loader.call(["neuro", "general"])
    found["two"] = (loaded.logits((NEURO, CHEST)), loaded.bytes_in_memory(), loader.resident)
    loader.call(["chest"])
    loader.call(["breast"])  # in the place of neuro, which nobody called for longer
    found["after"] = (loaded.logits((BREAST,)), loaded.bytes_in_memory(), loader.resident)
    return found


@pytest.mark.parametrize("expert", [1, 2], ids=["one process", "EP2"])
def test_logits_and_memory_while_pools_come_and_go(expert: int, checkpoint: str, ranks: Any) -> None:
    want = {
        called: ranks.run(logits, 1, whole(routing="hard", balance="bias"), checkpoint, called, {})[0]
        for called in ((CHEST,), (NEURO, CHEST), (BREAST,))
    }
    weights = Weights(Path(checkpoint))
    others = [name for name in weights if ".experts." not in name and "prior" not in name]
    rest = 4 * sum(math.prod(weights.shape(name)) for name in others)
    for found in ranks.run(go_through, expert, checkpoint, {"expert": expert}):
        # fp32. Padding goes to other experts, and a product of more or fewer rows may sum in another order.
        for name, called in (("chest", (CHEST,)), ("two", (NEURO, CHEST)), ("after", (BREAST,))):
            np.testing.assert_allclose(found[name][0], want[called], rtol=1e-5, atol=1e-5, err_msg=name)
        # In proportion to the experts that are there, but for 4 bytes that stand for each weight that is not.
        own = EXPERT // expert
        placeholders = 4 * 2 * 2 * 8 // expert
        assert found["chest"][2] == 4 * own
        assert found["chest"][1] - found["none"] == pytest.approx(4 * own, abs=placeholders)
        assert found["two"][1] - found["none"] == pytest.approx(6 * own, abs=placeholders)
        assert found["two"][2] == ("chest", "neuro")
        assert found["after"][1] - found["none"] == pytest.approx(6 * own, abs=placeholders)
        assert found["after"][2] == ("chest", "breast")
        assert found["none"] - 2 * own == pytest.approx(rest, abs=placeholders)


def reads(checkpoint: str) -> list[Any]:
    """Parts of the checkpoint that each call asks for."""
    loader = load(checkpoint, {}).loader
    asked: list[Any] = []
    original = loader._weights.fill

    def fill(parts: Any) -> None:
        listed = list(parts)
        asked.append(sorted({(name.rpartition(".mlp.")[2], offsets[0]) for name, offsets, _ in listed}))
        original(listed)

    loader._weights.fill = fill  # type: ignore[method-assign]
    for names in (["neuro"], ["neuro"], ["neuro", "breast"]):
        loader.call(names)
    return asked


def test_a_call_reads_the_experts_that_are_missing_and_nothing_else(checkpoint: str, ranks: Any) -> None:
    members = whole().language.moe.resolved.members
    asked = ranks.run(reads, 1, checkpoint)[0]
    for found, name in ((asked[0], "neuro"), (asked[2], "breast")):
        parts = [f"experts.experts.linear_fc{i}.weight" for i in (1, 2)]
        assert found == sorted((part, number) for part in parts for number in members[name])
    assert asked[1] == []


def refusals(checkpoint: str) -> list[str]:
    loaded = load(checkpoint, {}, most_bytes=4 * EXPERT)
    loader = loaded.loader
    loader.call(["chest"])
    said = [
        refused(loader.call, ["chset"]),
        refused(loader.call, ["chest", "neuro"]),
        refused(loaded.logits, (CHEST, NEURO)),
        refused(loaded.logits, (CHEST, 0)),
    ]
    assert loader.resident == ("chest",), "what was refused changes nothing"
    loaded.logits((CHEST,))
    return said


def test_what_cannot_be_computed_or_kept_is_said(checkpoint: str, ranks: Any) -> None:
    name, budget, missing, none = ranks.run(refusals, 1, checkpoint)[0]
    assert name == "there is no pool chset; did you mean chest?"
    assert budget == (
        f"pools chest, neuro take {6 * EXPERT:,} bytes on this rank; allowed are {4 * EXPERT:,} bytes"
    )
    assert missing == "a token calls neuro, which is not in memory; call(...) it first"
    assert none.startswith("a token without specialties chooses from all experts, and those of neuro, breast are not")


def call_on_one_rank(checkpoint: str) -> None:
    loaded = load(checkpoint, {"expert": 2})
    if torch.distributed.get_rank() == 0:
        loaded.loader.call(["chest"])
        loaded.logits((CHEST,))
    else:
        loaded.loader.call(["neuro"])
        loaded.logits((NEURO,))


def test_ranks_that_call_other_pools_end_with_an_error(checkpoint: str, ranks: Any) -> None:
    with pytest.raises(AssertionError, match="tokens of (chest|neuro) came, which is not in memory on this rank"):
        ranks.run(call_on_one_rank, 2, checkpoint)


def all_called(checkpoint: str) -> np.ndarray:
    loaded = load(checkpoint, {})
    loaded.loader.call(["chest", "neuro", "breast"])
    return loaded.logits((0, CHEST))


def test_with_all_pools_a_token_may_have_no_specialty(checkpoint: str, ranks: Any) -> None:
    want = ranks.run(logits, 1, whole(routing="hard", balance="bias"), checkpoint, (0, CHEST), {})[0]
    assert np.array_equal(ranks.run(all_called, 1, checkpoint)[0], want)


def no_pools(run: str) -> str:
    save(dense(), run, 1)
    return refused(SpecialistLoader, find_checkpoint(Path(run), ""), None)


def test_a_model_without_pools_is_refused(ranks: Any, tmp_path: Path) -> None:
    assert "its model has no pools of experts" in ranks.run(no_pools, 1, str(tmp_path))[0]
