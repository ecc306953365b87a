"""Config values that no run could make right."""

import pytest

from megamed.data import DataConfig, validate
from megamed.utils import UserError


def test_defaults_are_valid():
    validate(DataConfig())


@pytest.mark.parametrize(
    "key, value",
    [
        ("path", ""),
        ("tokenizer", ""),
        ("seq_length", 1),
        ("seed", -1),
        ("min_volumes", 2),
        ("max_volumes", 2),
        ("held_out", 1.0),
        ("held_out", -0.1),
        ("questions", 0),
        ("text_only", 1.1),
    ],
)
def test_bad_value_is_named(key, value):
    with pytest.raises(UserError, match=rf"data\.{key} is {value!r}; it has to be") as caught:
        validate(DataConfig(**{key: value}))
    assert caught.value.everywhere
