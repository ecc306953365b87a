"""tools/specialisation.py: its task, the counting of steps, and a short training through the command, twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megamed.data.batch import ANSWER
from megamed.utils import UserError
from tools.specialisation import WITH, WITHHELD, finished, in_words, steps_to
from tools.specialisation_task import FIRST, NAMES, UNKNOWN, TwoDomains, settings

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tools" / "specialisation.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", script, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


def test_the_tables_contradict_each_other() -> None:
    alpha, beta = TwoDomains(3).values
    assert (alpha == beta).mean() < 0.1  # by chance 1 in 32
    assert not (TwoDomains(3).values == TwoDomains(4).values).all()


def test_the_same_documents_for_every_arm() -> None:
    plain, told = TwoDomains(3).microbatch(7), TwoDomains(3, told_in_text=True).microbatch(7)
    named = told.tokens_S >= NAMES
    assert torch.equal(told.tokens_S[~named], plain.tokens_S)
    assert int(named.sum()) == len(plain.sample_ids)
    # The name is said where the metadata say it, and withheld where they are.
    assert torch.equal(told.tokens_S[named] == UNKNOWN, told.specialty_S[named] == 0)
    assert torch.equal(told.specialty_S[named] > 0, plain.specialty_S.view(len(plain.sample_ids), -1)[:, 0] > 0)


def test_the_value_is_what_the_domains_table_has_for_the_key() -> None:
    source = TwoDomains(3)
    row = source.whole(5)
    (labelled,) = torch.nonzero(row.loss_kind_S == ANSWER, as_tuple=True)
    assert len(labelled) == len(row.sample_ids)
    for place in labelled.tolist():
        a, b = (int(row.tokens_S[place + i]) - FIRST[kind] for i, kind in ((-1, 1), (0, 2)))
        domain = int(row.specialty_S[place]) - 1
        assert int(row.labels_S[place]) == FIRST[3] + source.values[domain, a, b]


def test_metadata_are_withheld_from_some_documents_or_all() -> None:
    source = TwoDomains(3)
    share = (source.microbatch(0).specialty_S == 0).float().mean()
    assert 0.15 < share < 0.45  # of 128 documents three in ten
    assert all((row.specialty_S > 0).all() for row in source.held_out_rows(with_metadata=True))
    assert not any(row.specialty_S.any() for row in source.held_out_rows(with_metadata=False))


def test_steps_are_counted_to_where_the_loss_stays_below() -> None:
    curve = [[0, 3.0, 3.0], [10, 0.4, 2.0], [20, 0.6, 1.0], [30, 0.2, 0.6]]
    assert steps_to(curve, 0.5, WITH) == pytest.approx(22.5)
    assert steps_to(curve, 0.5, WITHHELD) is None
    assert steps_to(curve, 4.0, WITH) == 0.0
    assert in_words([3.0, 1.0, 2.0]) == "2 (1 to 3)"
    assert in_words([3.0, None]) == "reached from 1 of 2 seeds" and in_words([None]) == "not reached"


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "soft-1.json").write_text(json.dumps({"settings": settings(100, 25)}))
    assert finished(tmp_path, "soft", 1, settings(100, 25)) is not None
    assert finished(tmp_path, "soft", 2, settings(100, 25)) is None
    with pytest.raises(UserError, match=r"soft-1.json: was trained with steps=100, and 200 is asked for"):
        finished(tmp_path, "soft", 1, settings(200, 25))
    (tmp_path / "soft-1.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        finished(tmp_path, "soft", 1, settings(100, 25))


def test_a_short_study_goes_on_where_it_was(tmp_path: Path) -> None:
    options = ("--out", tmp_path, "--arms", "soft", "--seeds", 1, "--steps", 4, "--every", 2, "--loss", 3.6)
    done = command(*options)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "soft-1.json").read_text())
    assert [row[0] for row in result["curve"]] == [0, 2, 4]
    assert all(1.0 < loss < 5.0 for _, *losses in result["curve"] for loss in losses)
    assert result["active_parameters"] < result["parameters"]
    assert f"| specialists, soft | {result['parameters']:,} | {result['active_parameters']:,} |" in done.stdout
    for name in ("specialisation.png", "specialisation_routing.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    # Nothing is trained again: a mark in the result stays.
    (tmp_path / "soft-1.json").write_text(json.dumps(result | {"mark": 1}))
    again = command(*options, "--replot")
    assert again.returncode == 0 and again.stdout == done.stdout
    assert "mark" in (tmp_path / "soft-1.json").read_text()
    lacking = command(*options, "--replot", "--arms", "soft", "hard")
    assert lacking.returncode == 2 and "has no result of hard from all seeds" in lacking.stderr
