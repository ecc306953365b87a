"""Which slices of a place belong to which volume of a run, and the time between volumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from megamed.data.readers.base import Refusal
from megamed.data.readers.dicom.geometry import Item, Place

Volume = list[Item]
_Key = Callable[[Item], Hashable]

# Repetition times of runs, from inverse imaging to sparse sampling, lie within; a header in another unit does not.
_PLAUSIBLE_S = (0.05, 60.0)

_HALF_DAY_S = 43_200.0
_COMPLETE = "copy the missing files, or take out those of the incomplete volumes"


def sort_volumes(places: Sequence[Place]) -> tuple[list[Volume], list[str], list[Item]]:
    """Volumes in time, each with its slices in the order of the places.

    Returns:
        The volumes; notes; slices of an unfinished last volume, which are left out.

    Raises:
        Refusal: volumes in the middle of the run are incomplete, or nothing says which slice came first.
    """
    num_volumes = max(len(place.items) for place in places)
    if num_volumes == 1:
        return [[place.items[0] for place in places]], [], []
    key = next((key for key in _keys(places) if _tells_volumes(key, places, num_volumes)), None)
    repeated = [place for place in places if len(place.items) > 1]
    if key is None and 2 * len(repeated) < len(places):
        firsts = [min(place.items, key=_instance) for place in places]
        note = f"{len(repeated)} slices were taken more than once; the first of each is used"
        return [firsts], [note], [item for place in repeated for item in place.items if item not in firsts]
    volumes = _by_instance_number(places) if key is None else _by_key(places, key)
    complete = [len(volume) == len(places) for volume in volumes]
    whole = complete.index(False) if False in complete else len(volumes)
    if any(complete[whole:]) or whole == 0:
        short = complete.index(False)
        raise Refusal(
            "incomplete-run",
            f"{complete.count(False)} of {len(volumes)} volumes are incomplete (volume {short + 1} has "
            f"{len(volumes[short])} of {len(places)} slices)",
            _COMPLETE,
        )
    left_out = [item for volume in volumes[whole:] for item in volume]
    notes = []
    if left_out:
        notes.append(
            f"{len(left_out)} slices of {len(volumes) - whole} unfinished "
            f"{'volume' if len(volumes) - whole == 1 else 'volumes'} at the end are left out"
        )
    return volumes[:whole], notes, left_out


def repetition_time(volumes: Sequence[Volume]) -> tuple[float | None, list[str]]:
    """Seconds from one volume to the next, and notes.

    MR's RepetitionTime where it can be that time: of multi-slice runs it is, of 3D sequences it is the time between
    two pulses, some milliseconds. Then, and elsewhere, the times of the volumes decide.
    """
    facts = volumes[0][0].facts
    stated = facts.repetition_ms if facts.modality == "MR" else None
    between, notes = _time_between(volumes)
    if stated is not None and _is_plausible(stated / 1000) and not (facts.three_d and between):
        return round(stated / 1000, 4), []
    if between is not None:
        return round(between, 4), notes
    if stated is not None and _is_plausible(stated) and not facts.three_d:
        return round(stated, 4), [f"RepetitionTime is {stated:g} ms, which no run has; read as seconds"]
    return None, ["the time between volumes is not known"] if len(volumes) > 1 else []


def _is_plausible(repetition_s: float) -> bool:
    return _PLAUSIBLE_S[0] <= repetition_s <= _PLAUSIBLE_S[1]


def _keys(places: Sequence[Place]) -> list[_Key]:
    """What may say which volume a slice is of, the most explicit first."""
    clock = [
        _unwrapped(places, lambda item: item.frame.acquired_s),
        _unwrapped(places, lambda item: item.frame.content_s),
    ]
    return [
        _temporal, _dimensions,
        lambda item: item.frame.reference_ms,
        lambda item: item.frame.acquisition,
        lambda item: item.frame.trigger_ms,
        *clock,
        lambda item: item.frame.instance,
    ]


def _temporal(item: Item) -> Hashable:
    return item.frame.temporal


def _dimensions(item: Item) -> Hashable:
    return item.frame.dimensions or None


def _unwrapped(places: Sequence[Place], clock: Callable[[Item], float | None]) -> _Key:
    """A time of the day that goes on past midnight."""
    times = [time for place in places for item in place.items if (time := clock(item)) is not None]
    past = bool(times) and max(times) - min(times) > _HALF_DAY_S

    def key(item: Item) -> float | None:
        time = clock(item)
        return time + 2 * _HALF_DAY_S if past and time is not None and time < _HALF_DAY_S else time

    return key


def _tells_volumes(key: _Key, places: Sequence[Place], num_volumes: int) -> bool:
    """Whether every slice has the key, no value comes twice at a place, and a value stands for a volume.

    AcquisitionNumber is the same throughout a Philips run, and AcquisitionTime differs from slice to slice on other
    scanners; neither then says anything about volumes. The first two keys mean the volume and nothing else.
    """
    values = [[key(item) for item in place.items] for place in places]
    distinct = {value for place in values for value in place}
    means_volumes = key in (_temporal, _dimensions) or len(distinct) == num_volumes
    return None not in distinct and means_volumes and all(len(set(place)) == len(place) for place in values)


def _by_key(places: Sequence[Place], key: _Key) -> list[Volume]:
    times = sorted({key(item) for place in places for item in place.items})  # type: ignore[type-var]
    index = {time: t for t, time in enumerate(times)}
    volumes: list[Volume] = [[] for _ in times]
    for place in places:
        for item in place.items:
            volumes[index[key(item)]].append(item)
    return volumes


def _by_instance_number(places: Sequence[Place]) -> list[Volume]:
    """Volumes where nothing but the numbers of the images tells of time.

    Scanners number images so that at one place the numbers rise with time, whether they count slice by slice or
    volume by volume. Where slices are missing, only the second way of counting shows which.
    """
    if any(item.frame.instance is None for place in places for item in place.items) or any(
        count > 1 for place in places for count in Counter(item.frame.instance for item in place.items).values()
    ):
        raise Refusal("unclear-order", "several slices lie at one place with the same number and time: copies of one "
                      "acquisition, or a run that does not say its order",
                      "give one of the copies alone, or convert the run to NIfTI, for instance with dcm2niix")
    rising = [sorted(place.items, key=_instance) for place in places]
    if len({len(place) for place in rising}) == 1:
        return [[place[t] for place in rising] for t in range(len(rising[0]))]
    where = {id(item): s for s, place in enumerate(places) for item in place.items}
    everything = sorted((item for place in places for item in place.items), key=_instance)
    size = len(places)
    volumes = [everything[start : start + size] for start in range(0, len(everything), size)]
    for volume in volumes:
        volume.sort(key=lambda item: where[id(item)])
        if len({where[id(item)] for item in volume}) < len(volume):
            raise Refusal("incomplete-run", "slices of the run are missing, nothing says of which volumes", _COMPLETE)
    return volumes


def _instance(item: Item) -> int:
    return item.frame.instance or 0


def _time_between(volumes: Sequence[Volume]) -> tuple[float | None, list[str]]:
    """The median of the times between volumes by their clocks, seconds; None where they do not rise."""
    if len(volumes) < 2:
        return None, []
    places = [Place(0.0, volume) for volume in volumes]
    clocks: list[tuple[_Key, float]] = [
        (lambda item: item.frame.reference_ms, 1e-3),
        (_unwrapped(places, lambda item: item.frame.acquired_s), 1.0),
        (lambda item: item.frame.trigger_ms, 1e-3),
        (_unwrapped(places, lambda item: item.frame.content_s), 1.0),
    ]
    for clock, unit in clocks:
        times = [[clock(item) for item in volume] for volume in volumes]
        if any(time is None for volume in times for time in volume):
            continue
        steps = np.diff([min(volume) for volume in times]) * unit  # type: ignore[type-var]
        if (steps > 0).all():
            median = float(np.median(steps))
            uneven = float(np.ptp(steps)) > 0.1 * median
            return median, ["volumes are not evenly spaced in time"] if uneven else []
    return None, []
