"""Which frames are shown."""

import pytest

from megamed.data.frames.choice import choice_of, slice_positions, thin, volume_times, within
from megamed.data.frames.config import ChoiceConfig
from megamed.data.samples.schema import FrameChoice
from megamed.data.series import SeriesInfo
from megamed.utils import UserError


@pytest.mark.parametrize(("count", "every", "at_most", "wanted"), [
    (5, 1, None, [0, 1, 2, 3, 4]),
    (7, 3, None, [0, 3, 6]),
    (10, 1, 10, list(range(10))),
    (10, 1, 4, [0, 3, 6, 9]),
    (10, 2, 2, [0, 8]),
    (9, 1, 1, [4]),
    (1, 5, 3, [0]),
])
def test_every_and_at_most(count, every, at_most, wanted):
    assert thin(range(count), every, at_most) == wanted


@pytest.mark.parametrize("count", range(1, 60))
def test_at_most_is_even_with_both_ends_and_no_frame_twice(count):
    for at_most in range(2, count + 3):
        chosen = thin(range(count), 1, at_most)
        assert len(chosen) == min(count, at_most) == len(set(chosen))
        assert (chosen[0], chosen[-1]) == (0, count - 1)
        gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_range_is_of_positions_and_comes_first():
    irregular = SeriesInfo(shape=(1, 5, 4, 4), spacing_mm=(1, 1, 4), slice_positions_mm=(0.0, 1.1, 5.1, 9.1, 16.1))
    positions = slice_positions(irregular)
    assert within(positions, (1.1, 9.1), 5, "frames.range_mm") == [1, 2, 3]  # ends included, whatever their rounding
    assert slice_positions(SeriesInfo(shape=(1, 3, 4, 4), spacing_mm=(1, 1, 2.5))) == [0.0, 2.5, 5.0]
    assert volume_times(SeriesInfo(shape=(3, 1, 4, 4), repetition_time_s=2.0)) == [0.0, 2.0, 4.0]
    assert within(None, None, 3, "x") == [0, 1, 2]
    with pytest.raises(UserError, match="frames.range_mm: nothing lies from 20 to 30; give a range between 0 and 16"):
        within(positions, (20, 30), 5, "frames.range_mm")
    with pytest.raises(UserError, match="frames.range_s: what is shown has no such positions"):
        within(None, (0, 1), 5, "frames.range_s")


def test_a_sample_overrules_the_configuration():
    default = ChoiceConfig(every=2, at_most=9)
    assert choice_of(None, default) == FrameChoice(every=2, at_most=9)
    assert choice_of(FrameChoice(at_most=3), default) == FrameChoice(every=1, at_most=3)
    with pytest.raises(UserError, match="every is 0"):
        thin([1], 0)
