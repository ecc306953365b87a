"""A rank of a deep model, from a few layers of it.

Layers are alike, and so are microbatches: what a rank holds, takes and does grows by the same with each. So a rank is
traced with two layers of each part, with one more of the language model, and with one more of the vision tower; and
the language model is run with as many microbatches as are in flight at any time. The rest is multiplication. A model
whose first layers are unlike the others is traced whole.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields

from megamed.data import Microbatch
from megamed.preflight.held import Held
from megamed.preflight.step import LANGUAGE, Rank, trace_rank
from megamed.preflight.trace import Peak
from megamed.preflight.work import Work
from megamed.train import JobConfig


def estimate_rank(
    config: JobConfig, rank: int, world_size: int, microbatches: Sequence[Microbatch], few: int = 2
) -> Rank:
    """What `trace_rank` would say, in a fraction of its time.

    Args:
        config, rank, world_size, microbatches: the same.
        few: layers of each part that are built at the least. Of one alone, the moment of most memory is more likely
            to be another than that of many.
    """
    parallel = config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    deep, tall = config.model.language.num_layers // chunks, config.model.vision.num_layers_run
    if config.model.language.moe.first_dense_layers or (deep <= few + 1 and tall <= few + 1):
        return trace_rank(config, rank, world_size, microbatches)
    # 1F1B has as many in flight as there are stages; interleaved chunks up to half as many more, and a multiple of it.
    in_flight = parallel.pipeline if parallel.virtual_pipeline == 1 else 2 * parallel.pipeline
    num_language = min(max(in_flight, 2), len(microbatches))

    def trace(more_language: int, more_vision: int) -> Rank:
        small = deepcopy(config)
        small.model.language.num_layers = chunks * (min(few, deep) + more_language)
        small.model.vision.num_layers = min(few, tall) + more_vision
        small.model.vision.output_layer = -1
        found = trace_rank(small, rank, world_size, microbatches, num_language)
        found.work[LANGUAGE] = found.work[LANGUAGE] * (len(microbatches) / num_language)
        return found

    base = trace(0, 0)
    found = base
    for missing, more in ((deep - few, (1, 0)), (tall - few, (0, 1))):
        if missing > 0:
            found = _grown(found, base, trace(*more), missing)
    return found


def _grown(rank: Rank, base: Rank, more: Rank, times: int) -> Rank:
    """A rank with what `more` has over `base`, so many times."""

    def grow(now: int, before: int, after: int) -> int:
        return now + times * (after - before)

    held = Held(*(grow(*(getattr(x.held, f.name) for x in (rank, base, more))) for f in fields(Held)))
    phases = {name: grow(*(x.peak.phases[name] for x in (rank, base, more))) for name in rank.peak.phases}
    parts = {
        phase: {part: grow(*(x.peak.parts[phase].get(part, 0) for x in (rank, base, more))) for part in of_phase}
        for phase, of_phase in rank.peak.parts.items()
    }
    work = {name: _grown_work(rank.work[name], base.work[name], more.work[name], times) for name in rank.work}
    left = grow(rank.peak.left, base.peak.left, more.peak.left)
    return Rank(held, Peak(phases, parts, left), work, {**rank.groups, **more.groups})


def _grown_work(work: Work, base: Work, more: Work, times: int) -> Work:
    return work + (more + base * -1) * times
