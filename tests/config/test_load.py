"""Strict loading of values into dataclasses."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from omegaconf import OmegaConf

from megamed.config import load, to_yaml
from megamed.utils import UserError


@dataclass
class Parallel:
    tensor: int = 1
    pipeline: int = 1
    backend: Literal["nccl", "gloo"] = "nccl"
    ratio: float = 0.5

    def __post_init__(self):
        if self.tensor < 1:
            raise UserError(f"parallel.tensor={self.tensor}: give a positive number")


@dataclass
class Stage:
    steps: int
    name: str = "warm-up"


@dataclass
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    windows: tuple[int, ...] = ()
    decay: float | Literal["auto"] | None = None


@dataclass
class Run:
    name: str
    parallel: Parallel = field(default_factory=Parallel)
    optim: Optim | None = None
    stages: list[Stage] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    resume: bool = False
    derived: int = field(init=False, default=0)


def message(values, cls=Run, path=""):
    with pytest.raises(UserError) as caught:
        load(cls, values, path)
    assert caught.value.everywhere
    return str(caught.value)


def test_values_reach_their_fields_and_the_rest_keep_defaults():
    run = load(Run, {
        "name": "ct",
        "parallel": {"tensor": 2},
        "optim": {"lr": 1, "betas": [0.8, 1], "windows": [1, 2, 3], "decay": "auto"},
        "stages": [{"steps": 5}, {"steps": 6, "name": "long"}],
        "weights": {"chest": 2, "neuro": 0.5},
        "resume": True,
    })
    assert run == Run("ct", Parallel(tensor=2), Optim(1.0, (0.8, 1.0), (1, 2, 3), "auto"),
                      [Stage(5), Stage(6, "long")], {"chest": 2.0, "neuro": 0.5}, True)
    assert type(run.optim.lr) is float and type(run.weights["chest"]) is float
    assert type(run.optim.betas) is tuple


def test_omegaconf_containers_are_taken_with_interpolations_resolved():
    values = OmegaConf.create({"name": "n", "parallel": {"tensor": "${parallel.pipeline}", "pipeline": 4}})
    assert load(Run, values).parallel.tensor == 4
    assert message(OmegaConf.create({"name": "${nope}"})) == "name: Interpolation key 'nope' not found"


def test_a_misspelt_key_is_named_in_full_with_the_nearest_right_one():
    assert message({"name": "n", "parallel": {"tensr": 2}}) == (
        "parallel.tensr: no such key; did you mean parallel.tensor?")
    assert message({"tensr": 2}, Parallel, "parallel") == (
        "parallel.tensr: no such key; did you mean parallel.tensor?")
    assert message({"name": "n", "stages": [{"steps": 1, "nmae": "a"}]}) == (
        "stages[0].nmae: no such key; did you mean stages[0].name?")


def test_a_key_at_the_wrong_level_is_found_where_it_belongs():
    assert message({"name": "n", "lr": 1e-3}) == "lr: no such key; did you mean optim.lr?"


def test_a_key_like_no_other_gets_the_list_of_valid_ones():
    assert message({"name": "n", "parallel": {"zzz": 2}}) == (
        "parallel.zzz: no such key; valid keys: tensor, pipeline, backend, ratio")


def test_a_field_that_is_not_set_from_outside_is_no_key():
    assert "derived: no such key" in message({"name": "n", "derived": 3})


@pytest.mark.parametrize(("values", "expected"), [
    ({"parallel": {"tensor": "2"}}, "parallel.tensor: expected an integer, not '2'"),
    ({"parallel": {"tensor": True}}, "parallel.tensor: expected an integer, not true"),
    ({"parallel": {"tensor": 2.0}}, "parallel.tensor: expected an integer, not 2.0; write 2"),
    ({"parallel": {"tensor": 2.5}}, "parallel.tensor: expected an integer, not 2.5"),
    ({"parallel": {"ratio": "half"}}, "parallel.ratio: expected a number, not 'half'"),
    ({"parallel": {"ratio": False}}, "parallel.ratio: expected a number, not false"),
    ({"parallel": {"ratio": None}}, "parallel.ratio: expected a number, not null"),
    ({"parallel": {"backend": "glo"}}, "parallel.backend: 'glo' is no choice; did you mean gloo? "
                                       "(choices: 'nccl', 'gloo')"),
    ({"parallel": {"backend": 1}}, "parallel.backend: 1 is no choice; choices: 'nccl', 'gloo'"),
    ({"parallel": None}, "parallel: expected keys and values, not null; write {} for its defaults"),
    ({"parallel": [1]}, "parallel: expected keys and values, not [1]"),
    ({"name": 2024}, "name: expected text, not 2024; put it in quotes"),
    ({"resume": 1}, "resume: expected true or false, not 1"),
    ({"optim": {"betas": [0.9]}}, "optim.betas: expected 2 values, not 1 ([0.9])"),
    ({"optim": {"betas": 0.9}}, "optim.betas: expected a list, not 0.9"),
    ({"optim": {"windows": [1, "a"]}}, "optim.windows[1]: expected an integer, not 'a'"),
    ({"optim": {"decay": "never"}}, "optim.decay: expected a number or one of 'auto' or null, not 'never'"),
    ({"optim": 3}, "optim: expected keys and values or null, not 3"),
    ({"stages": [{"steps": "x"}]}, "stages[0].steps: expected an integer, not 'x'"),
    ({"stages": "abc"}, "stages: expected a list, not 'abc'"),
    ({"weights": {"chest": "a"}}, "weights.chest: expected a number, not 'a'"),
    ({"weights": {3: 1.0}}, "weights, key 3: expected text, not 3; put it in quotes"),
    ({"weights": 3}, "weights: expected keys and values, not 3"),
])
def test_a_value_of_another_type_is_refused(values, expected):
    assert message({"name": "n", **values}) == expected


def test_what_is_required_must_be_given():
    assert message({}) == "name: a value is required (text); give name=..."
    assert message({"name": "???"}) == "name: a value is required (text); give name=..."
    assert message({"name": "n", "parallel": {"tensor": "???"}}) == (
        "parallel.tensor: a value is required (an integer); give parallel.tensor=...")


def test_all_faults_are_told_at_once():
    values = {"parallel": {"tensr": 1, "pipeline": "x", "tensor": 0}, "optim": {"lr": "fast"}}
    assert message(values) == (
        "name: a value is required (text); give name=...; "
        "parallel.tensr: no such key; did you mean parallel.tensor?; "
        "parallel.pipeline: expected an integer, not 'x'; "
        "optim.lr: expected a number, not 'fast'")


def test_what_a_dataclass_itself_refuses_is_told_with_the_rest():
    assert message({"parallel": {"tensor": 0}, "resume": 2}) == (
        "name: a value is required (text); give name=...; parallel.tensor=0: give a positive number; "
        "resume: expected true or false, not 2")


def test_an_exact_type_in_a_union_wins_over_a_conversion():
    @dataclass
    class Either:
        value: float | int | list[int] | list[str] = 0

    assert type(load(Either, {"value": 3}).value) is int
    assert load(Either, {"value": ["a"]}).value == ["a"]
    assert message({"value": [1, "a", "b"]}, Either) == "value[0]: expected text, not 1; put it in quotes"


def test_yaml_of_a_run_makes_the_same_run():
    # Texts that YAML would read as something else, and numbers at the ends of their ranges.
    run = Run("1e-5", Parallel(2, ratio=1e-7), Optim(float("inf"), (0.1, 1e22), (7,), None),
              [Stage(1, "null"), Stage(2, "off: #x")], {"1": 0.1 + 0.2})
    text = to_yaml(run)
    assert load(Run, OmegaConf.create(text)) == run
    assert text == to_yaml(load(Run, OmegaConf.create(text)))
    assert text.index("name:") < text.index("parallel:") < text.index("resume:")
