"""A dense checkpoint becomes specialists that compute the same; several dense ones become pools."""

import contextlib
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamed.checkpoint import find_checkpoint, model_of
from megamed.checkpoint.weights import Weights
from megamed.config import load
from megamed.models.moe import MoEConfig
from megamed.models.vlm import VLMConfig
from tests.checkpoint.small_models import WIDTH, dense, logits, save, train
from tests.launch.command import run
from tests.small_disk import mounted

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "upcycle.py"
POOLS = ("general=4", "chest=2", "neuro=2")

# fp32 of another order: two experts' halves are summed where one MLP was.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of dense models of one size: base, chest, neuro."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("base", "chest", "neuro")):
        ranks.run(save, 1, dense(), str(folder / name), seed)
    # As if it had begun with a Hugging Face model.
    (folder / "base" / "hf").mkdir()
    for name in ("weights.json", "tokenizer.json"):
        (folder / "base" / "hf" / name).write_text("{}")
    return folder


def upcycle(log: Path, *args: object) -> tuple[int, str]:
    return run(log, *map(str, args), script=TOOL)


def experts_of(checkpoint: Path) -> VLMConfig:
    """The model of a new checkpoint, with its moe.yaml."""
    import yaml

    config = model_of(checkpoint)
    moe = load(MoEConfig, yaml.safe_load((checkpoint / "moe.yaml").read_text()))
    return replace(config, language=replace(config.language, moe=moe))


@pytest.mark.parametrize(
    "options",
    [(), ("--shared", "32"), ("--shared", "48", "--width", WIDTH, "--routing", "hard", "--first-dense-layers", "1")],
    ids=["copies", "shared expert with a part", "shared expert from zero, hard, one layer dense"],
)
def test_the_mixture_computes_what_the_dense_model_does(
    options: tuple[str, ...], runs: Path, ranks: Any, tmp_path: Path
) -> None:
    args = ("--from", runs / "base", "--to", tmp_path / "moe", "--pools", *POOLS, *options)
    code, output = upcycle(tmp_path / "log", *args)
    assert code == 0, output
    want = ranks.run(logits, 1, dense(), str(runs / "base"), (0,), {})[0]
    config = experts_of(tmp_path / "moe")
    for called in ((0,), (1, 2, 3)):
        got = ranks.run(logits, 1, config, str(tmp_path / "moe"), called, {})[0]
        np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    assert np.abs(want).max() > 0.1
    assert (tmp_path / "moe" / "hf" / "tokenizer.json").is_file(), "what lies beside the weights goes with them"


def test_routers_are_drawn_as_a_new_model_draws_them(runs: Path, ranks: Any, tmp_path: Path) -> None:
    args = ("--from", runs / "base", "--to", tmp_path / "moe", "--pools", *POOLS, "--seed", 7)
    code, output = upcycle(tmp_path / "log", *args)
    assert code == 0, output
    config = experts_of(tmp_path / "moe")
    ranks.run(_save_unchanged, 1, config, str(tmp_path / "drawn"), 7)
    new, drawn = Weights(tmp_path / "moe"), Weights(find_checkpoint(tmp_path / "drawn", ""))
    for kind in ("weight", "prior"):
        name = f"language.decoder.layers.1.mlp.router.{kind}"
        assert new.read(name).equal(drawn.read(name))
    # And nothing that the model needs is missing, whoever reads it.
    ranks.run(_read_with_megatron, 1, config, str(tmp_path / "moe"))


def _save_unchanged(config: VLMConfig, folder: str, seed: int) -> None:
    from tests.checkpoint.small_models import build

    build(config, Path(folder), {}, seed=seed)[1].save(0, 0)


def _read_with_megatron(config: VLMConfig, checkpoint: str) -> None:
    from megatron.core import dist_checkpointing

    from megamed.checkpoint.state import model_state
    from tests.checkpoint.small_models import build

    job, _ = build(config, Path(checkpoint), {})
    dist_checkpointing.load(model_state(job.model.language, job.model.vision, job.mesh), checkpoint)


def test_variation_is_of_the_size_that_was_asked_for(runs: Path, tmp_path: Path) -> None:
    args = ("--from", runs / "base", "--pools", "general=2", "chest=2", "--to")
    for name, option, value in (("noise", "--noise", 0.1), ("reinit", "--reinit", 0.25)):
        code, output = upcycle(tmp_path / "log", *args, tmp_path / name, option, value)
        assert code == 0 and "no longer computes exactly what the dense model does" in output, output
    layer = "language.decoder.layers.0.mlp"
    whole = Weights(find_checkpoint(runs / "base", "")).read(f"{layer}.linear_fc2.weight").numpy()
    name = f"{layer}.experts.experts.linear_fc2.weight"
    noisy, anew = (Weights(tmp_path / folder).read(name).numpy() for folder in ("noise", "reinit"))
    # 6144 draws: their standard deviation is known to a hundredth.
    assert np.std(noisy - whole, axis=(1, 2)) == pytest.approx(0.1 * whole.std(), rel=0.04)
    assert not np.array_equal(noisy[0], noisy[1])
    changed = (anew != whole).all(axis=1)  # neurons, by expert
    assert changed.sum(1).tolist() == [WIDTH // 4] * 4 and not np.array_equal(changed[0], changed[1])
    assert (anew == whole)[np.broadcast_to(~changed[:, None], anew.shape)].all()
    gate = Weights(tmp_path / "reinit").read(f"{layer}.experts.experts.linear_fc1.weight", 0).numpy()
    before = Weights(find_checkpoint(runs / "base", "")).read(f"{layer}.linear_fc1.weight").numpy()
    assert np.array_equal((gate != before).all(1), np.tile(changed[0], 2)), "the same neurons in every matrix"


def test_models_that_were_trained_apart_become_pools(runs: Path, ranks: Any, tmp_path: Path) -> None:
    sources = [f"{name}={runs / run}" for name, run in (("general", "base"), ("chest", "chest"), ("neuro", "neuro"))]
    code, output = upcycle(tmp_path / "log", "--merge", *sources, "--to", tmp_path / "moe", "--experts", 2)
    assert code == 0, output
    new = Weights(tmp_path / "moe")
    old = {name: Weights(find_checkpoint(runs / name, "")) for name in ("base", "chest", "neuro")}
    layer = "language.decoder.layers.1"
    for name in (f"{layer}.self_attention.linear_qkv.weight", "vision.projector.fc1.weight",
                 f"{layer}.mlp.linear_fc1.layer_norm_weight", "language.embedding.word_embeddings.weight"):
        mean = np.mean([weights.read(name).numpy() for weights in old.values()], axis=0)
        # The mean of three in fp32.
        np.testing.assert_allclose(new.read(name).numpy(), mean, rtol=1e-6, atol=1e-7)
    experts = new.read(f"{layer}.mlp.experts.experts.linear_fc1.weight")
    owners = ["base", "chest", "neuro"] * 2  # pools take turns in the numbering
    for expert, owner in zip(experts, owners, strict=True):
        assert expert.equal(old[owner].read(f"{layer}.mlp.linear_fc1.weight"))
    losses = ranks.run(train, 2, experts_of(tmp_path / "moe"), str(tmp_path / "moe"), str(tmp_path), 2, {"expert": 2})
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all() and losses[0][1] < losses[0][0]
    assert f"init.checkpoint={tmp_path / 'moe'} optim.router_warmup_steps=200" in output


def test_the_command_that_is_printed_trains(tmp_path: Path) -> None:
    """From a run of launch/pretrain.py to one of its specialists, with rules that match studies, by a file."""
    small = ("+exp=fmri", "train.steps=2", "train.microbatches=1", "eval.held_out=false", "wandb.mode=disabled",
             f"run.dir={tmp_path}/runs", "optim.warmup_steps=1")
    code, output = run(tmp_path / "log", *small, "run.name=dense")
    assert code == 0, output
    args = ("--from", tmp_path / "runs" / "dense", "--to", tmp_path / "moe", "--pools")
    code, output = upcycle(tmp_path / "log", *args, "general=2", "neuro=2")
    assert code == 0, output
    command = shlex.split(output.strip().splitlines()[-1])
    assert command[:5] == [*"torchrun --nproc-per-node 2 launch/pretrain.py".split(), "model=internvl_tiny"]
    code, output = run(tmp_path / "log", *small, "run.name=moe", *command[4:])
    assert code == 0 and f"starting from the weights of {tmp_path / 'moe'}, of step 0" in output, output
    again = [word.replace("train.steps=2", "train.steps=3") for word in small]
    code, output = run(tmp_path / "again.log", *again, "run.name=moe", *command[4:])
    assert code == 0 and "going on from" in output and "starting from the weights" not in output, output
    losses = [first_loss(tmp_path / "runs" / name) for name in ("dense", "moe")]
    assert losses[1] < losses[0], "it goes on from where the dense model was"
    code, output = upcycle(tmp_path / "log", *args, ROOT / "conf/model/moe/specialists.yaml", "--overwrite")
    assert code == 0, output
    assert output.strip().splitlines()[-2] == f"cp {tmp_path}/moe/moe.yaml conf/model/moe/moe.yaml"
    assert "model/moe=moe init.checkpoint=" in output.strip().splitlines()[-1]
    assert "body_part" in (tmp_path / "moe" / "moe.yaml").read_text()


def first_loss(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--from", "{runs}/base", "--pools", "chest=0"), "--pools chest=0: a pool has 1 expert or more"),
        (("--from", "{runs}/base", "--pools", "chest=2", "chest=4"), "--pools: pools overlap: chest is given twice"),
        (("--from", "{runs}/base", "--pools", "Chest=2"), "Chest: is no name for a pool"),
        (("--from", "{runs}/base", "--pools", "nowhere.yaml"), "--pools nowhere.yaml: cannot be read (No such file"),
        (("--from", "{runs}/base", "--pools", "a=2", "--top-k", "1"), "take --top-k 2 or more"),
        (("--from", "{runs}/base", "--pools", "a=2", "--width", "64", "--shared", "16"),
         "experts of width 64 cannot compute what the dense MLP of width 96 does; take experts of 96, or of 80 beside"),
        (("--from", "{runs}", "--pools", "a=2"), "holds no checkpoint"),
        (("--from", "{runs}/nowhere", "--pools", "a=2"), "nowhere: is no folder"),
        (("--merge", "a={runs}/base", "a={runs}/chest"), "--merge: pools overlap: a is given twice"),
        (("--merge", "a={runs}/base", "b={wide}"), "(model.language.intermediate_size is 96 and 128)"),
        (("--merge", "a={moe}", "b={moe}"), "has experts already (general=2)"),
        (("--from", "{moe}", "--pools", "a=2"), "has experts already (general=2)"),
        (("--from", "{runs}/base", "--pools", "a=2", "--to", "{runs}/base"), "is there, and is no checkpoint"),
        (("--from", "{runs}/base", "--pools", "a=2", "--to", "{moe}"), "replace it with --overwrite"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(
    options: tuple[str, ...], message: str, runs: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    given = [option.format(runs=runs, **others) for option in options]
    code, output = upcycle(tmp_path / "log", *given, *([] if "--to" in given else ["--to", tmp_path / "new"]))
    assert code == 2 and "Traceback" not in output, output
    assert message in output and output.count("megamed: error") == 1, output
    assert not list(tmp_path.glob("new*"))


@pytest.fixture(scope="module")
def others(runs: Path, ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wider dense model, and a mixture."""
    folder = tmp_path_factory.mktemp("others")
    ranks.run(save, 1, dense(intermediate_size=128), str(folder / "wide"), 3)
    code, output = upcycle(folder / "log", "--from", runs / "base", "--to", folder / "moe", "--pools", "general=2")
    assert code == 0, output
    return {"wide": folder / "wide", "moe": folder / "moe"}


def test_a_disk_that_is_full_or_fills_up(runs: Path, tmp_path: Path) -> None:
    args = ("--from", runs / "base", "--pools", "general=8", "chest=8")
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(mounted(tmp_path / "disk", "1m"))
        code, output = upcycle(tmp_path / "log", *args, "--to", disk / "moe")
        assert code == 2 and "MiB, and 1 MiB are free there; free space" in output, output
        assert not list(disk.iterdir())
