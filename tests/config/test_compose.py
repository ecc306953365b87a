"""Composition of YAML files and overrides, and what it says when it cannot."""

from dataclasses import dataclass, field

import pytest
from hydra.core.global_hydra import GlobalHydra

from megamed.config import compose, load
from megamed.utils import UserError


@dataclass
class Parallel:
    tensor: int = 1
    context: int = 1


@dataclass
class Run:
    model: dict[str, int]
    parallel: Parallel = field(default_factory=Parallel)
    seed: int = 0
    twice: int = 0
    name: str = ""


@pytest.fixture
def conf(tmp_path):
    files = {
        "pretrain.yaml": "defaults:\n  - model: tiny\n  - _self_\n"
                         "parallel:\n  tensor: 1\nseed: 3\ntwice: ${seed}\n",
        "model/tiny.yaml": "hidden: 4\n",
        "model/large.yaml": "hidden: 4096\n",
        "exp/fmri.yaml": "# @package _global_\ndefaults:\n  - override /model: large\nseed: 7\n",
        "exp/internvl26b.yaml": "# @package _global_\nparallel:\n  tensor: 4\n",
    }
    folder = tmp_path / "conf"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def message(conf, *overrides, name="pretrain"):
    with pytest.raises(UserError) as caught:
        compose(conf, name, list(overrides))
    assert caught.value.everywhere
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_and_overrides_are_merged_and_interpolations_resolved(conf):
    assert compose(conf, "pretrain", []) == {
        "model": {"hidden": 4}, "parallel": {"tensor": 1}, "seed": 3, "twice": 3}
    assert compose(conf, "pretrain", ["+exp=fmri", "parallel.tensor=2"]) == {
        "model": {"hidden": 4096}, "parallel": {"tensor": 2}, "seed": 7, "twice": 7}
    assert compose(conf, "pretrain", ["model=large", "~parallel", "seed=1e3", "twice=[1,a]"]) == {
        "model": {"hidden": 4096}, "seed": 1000.0, "twice": [1, "a"]}


def test_a_relative_folder_is_taken_from_where_the_program_runs(conf, monkeypatch):
    monkeypatch.chdir(conf.parent)
    assert compose("conf", "pretrain", [])["seed"] == 3


def test_nothing_of_hydra_stays_behind(conf):
    compose(conf, "pretrain", [])
    message(conf, "+exp=none")
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_value_is_set_whether_or_not_yaml_has_its_key(conf, prefix):
    values = compose(conf, "pretrain", [f"{prefix}parallel.tensor=2", f"{prefix}parallel.context=4",
                                        f"{prefix}name='a, b'"])
    assert load(Run, values) == Run({"hidden": 4}, Parallel(2, 4), 3, 3, "a, b")


def test_a_misspelt_value_key_is_found_by_the_schema(conf):
    with pytest.raises(UserError, match=r"^parallel\.tensr: no such key; did you mean parallel\.tensor\?$"):
        load(Run, compose(conf, "pretrain", ["parallel.tensr=2"]))


def test_a_file_that_is_not_there(conf):
    assert message(conf, "+exp=fmrii") == (
        "+exp=fmrii: no such file conf/exp/fmrii.yaml; did you mean +exp=fmri? "
        "(there are: fmri, internvl26b)")
    assert message(conf, "model=huge") == (
        "model=huge: no such file conf/model/huge.yaml; there are: large, tiny")
    assert message(conf, name="pretrian") == (
        "pretrian: no such file conf/pretrian.yaml; did you mean pretrain? (there are: pretrain)")
    (conf / "other.yaml").write_text("defaults:\n  - model: tinny\n")
    assert message(conf, name="other") == (
        "model=tinny: no such file conf/model/tinny.yaml; did you mean model=tiny? (there are: large, tiny)")


def test_a_folder_that_is_not_there(conf):
    folder = conf.parent / "config"
    assert message(folder) == f"{folder}: no such folder; it should hold pretrain.yaml"


def test_a_misspelt_group(conf):
    assert message(conf, "+expp=fmri") == "+expp=fmri: no such config group expp; did you mean +exp=fmri?"
    assert message(conf, "modle=tiny") == "modle=tiny: no such config group modle; did you mean model=tiny?"
    assert message(conf, "model/x=tiny") == (
        "model/x=tiny: no such config group model/x; did you mean model=tiny?")
    assert message(conf, "a/b=c") == "a/b=c: no such config group a/b; there are: exp, model"
    # A key that only looks like a group's name can still be set.
    assert compose(conf, "pretrain", ["expp=none"])["expp"] == "none"
    assert compose(conf, "pretrain", ["++expp=fmri"])["expp"] == "fmri"


def test_a_plus_too_few_or_too_many(conf):
    assert "use +exp=fmri" in message(conf, "exp=fmri")
    assert message(conf, "+model=large") == (
        "Multiple values for model; to replace the one there is, write group=option without a +")
    assert message(conf, "model=null") == (
        "model=null: model is a config group, and takes the name of a file in conf/model")


@pytest.mark.parametrize("text", ["seed", "--seed=3", "path=a=b", "=3", "a.b.=3", "x=[1,2", ""])
def test_an_override_that_cannot_be_read(conf, text):
    assert message(conf, text).startswith(f"{text}: cannot be read as an override (")


def test_a_sweep_is_not_taken_for_a_list(conf):
    assert message(conf, "seed=1,2") == (
        "seed=1,2: one value is needed here; write seed=[...] for a list, "
        "or put text that has a comma in quotes")


def test_a_key_that_cannot_be_removed(conf):
    assert message(conf, "~nope") == "Could not delete from config. 'nope' does not exist."


def test_an_interpolation_that_leads_nowhere(conf):
    assert message(conf, "seed=${nope}") == "seed: Interpolation key 'nope' not found"
    (conf / "other.yaml").write_text("x: ${\n")
    assert message(conf, name="other") == "no viable alternative at input '${'"


def test_a_file_that_is_no_yaml_is_named(conf):
    (conf / "exp/broken.yaml").write_text("a: [1\nb: {")
    text = message(conf, "+exp=broken")
    assert text.startswith("cannot be read as YAML: ") and f'"{conf}/exp/broken.yaml", line 2' in text


def test_a_value_that_whoever_runs_must_give_stays_marked(conf):
    (conf / "other.yaml").write_text("model: {}\nseed: ???\n")
    with pytest.raises(UserError, match=r"^seed: a value is required \(an integer\); give seed=\.\.\.$"):
        load(Run, compose(conf, "other", []))
