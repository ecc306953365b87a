"""CT windows by name.

The values are those of Radiopaedia's article "Windowing (CT)" (radiopaedia.org/articles/windowing-ct), which has what
is customary; where it gives a range, the middle of it. All in HU.
"""

from __future__ import annotations

from collections.abc import Sequence

from megamed.data.frames.spec import Window
from megamed.utils import UserError

WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-600.0, 1500.0),
    "mediastinum": (50.0, 350.0),
    "soft_tissue": (40.0, 375.0),
    "abdomen": (50.0, 400.0),
    "liver": (30.0, 150.0),
    "spine": (50.0, 250.0),
    "bone": (400.0, 1800.0),
    "brain": (40.0, 80.0),
    "subdural": (75.0, 215.0),
    "blood": (75.0, 215.0),
    "stroke": (40.0, 40.0),
    "temporal_bone": (600.0, 2800.0),
}
"""Centre and width of each."""

WindowName = str | tuple[float, float]
"""A name of `WINDOWS`, or (centre, width)."""


def window(name: WindowName, key: str) -> Window:
    """The values that become 0 and 1.

    Args:
        name: a name, or centre and width.
        key: where it was written, for messages.

    Raises:
        UserError: no window has that name, or a width is not above 0.
    """
    if isinstance(name, str):
        if name not in WINDOWS:
            raise UserError(f"{key}: there is no CT window {name!r}; give one of {', '.join(WINDOWS)}, or "
                            "[centre, width] in HU", everywhere=True)
        name = WINDOWS[name]
    centre, width = name
    if not width > 0:
        raise UserError(f"{key}: a window of [{centre:g}, {width:g}] has no width; give [centre, width] with a width "
                        "above 0", everywhere=True)
    return centre - width / 2, centre + width / 2


def three_windows(names: Sequence[WindowName], key: str) -> tuple[Window, Window, Window]:
    """The windows of the three channels, of three names, or of one for all.

    Raises:
        UserError: there are neither one nor three, or one is none.
    """
    if len(names) not in (1, 3):
        raise UserError(f"{key} has {len(names)} windows; give three, one a channel, or one for all", everywhere=True)
    red, green, blue = (window(name, key) for name in (*names, *names, *names)[:3])
    return red, green, blue
