"""A training sample as JSON Lines has it, in the convention that ms-swift and others share.

    {"messages": [{"role": "user", "content": "<study>Any bleeding?"}, {"role": "assistant", "content": "No."}],
     "studies": [{"series": "4f0c...", "windows": ["brain", "subdural", "bone"], "frames": {"at_most": 64}}]}

Tags in the text, `<image>`, `<video>` and `<study>`, stand where the next entry of `images`, `videos` and `studies`
is shown. Entries without a tag come before the first user message's text, in the order studies, videos, images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn. `loss` of an assistant's turn may be switched off (False); None is the default of its role."""

    role: Role
    content: str
    loss: bool | None = None


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a study are shown. Applied in this order: range, every, at_most.

    Attributes:
        range_mm: from and to, along the stack from its first slice, in mm; None is all of it.
        range_s: from and to in seconds, of a run; None is all of it.
        every: every n-th frame.
        at_most: so many, spread evenly, the ends included; None is all.
    """

    range_mm: tuple[float, float] | None = None
    range_s: tuple[float, float] | None = None
    every: int = 1
    at_most: int | None = None


@dataclass(frozen=True)
class StudyRef:
    """A series of a volume store, and how it is shown.

    Attributes:
        series: its name in the store.
        windows: three for the three channels, or one for all: names ("lung") or (centre, width); None takes the
            configuration's for the modality.
        frames: None takes the configuration's.
    """

    series: str
    windows: tuple[str | tuple[float, float], ...] | None = None
    frames: FrameChoice | None = None


@dataclass(frozen=True)
class Sample:
    """One line.

    Attributes:
        messages: the conversation.
        images: paths of pictures, relative to the file's folder or absolute.
        videos: a path each (a film, or a folder of pictures), or the paths of its frames.
        studies: series of a volume store.
        rejected_response: the answer that is not preferred, for alignment.
        label: for KTO and for classification.
        objects: boxes and their names, as given.
        specialties: pools of experts that it calls, by name or label, in the place of what its series' metadata
            would; None leaves it to them.
        line: number of the line, from 1.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str | tuple[str, ...], ...] = ()
    studies: tuple[StudyRef, ...] = ()
    rejected_response: str | None = None
    label: Any = None
    objects: dict[str, Any] = field(default_factory=dict)
    specialties: tuple[str, ...] | None = None
    line: int = 0
