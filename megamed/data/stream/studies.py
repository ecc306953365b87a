"""A source of studies, built from the configuration."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from megamed.data.config import FACTS, REPORTS, DataConfig, DatasetConfig
from megamed.data.frames import FrameLoader
from megamed.data.frames.loader import build_loader
from megamed.data.samples import load
from megamed.data.series import SeriesInfo
from megamed.data.specialties import Specialties, Specialty
from megamed.data.store import VolumeStore
from megamed.data.stream.chat import ChatWriter
from megamed.data.stream.datasets import DataSet, FactSamples, FileSamples
from megamed.data.stream.documents import Documents
from megamed.data.stream.held_out import HeldOutSeries, held_out_patients
from megamed.data.stream.source import StreamOptions, StudySource
from megamed.data.tokenizer import TextTokenizer
from megamed.utils import UserError

log = logging.getLogger("megamed.data")

# Series of the held-out part that are asked about, half a dozen questions each, with so many frames.
HELD_OUT_SERIES, HELD_OUT_FRAMES = 12, 16
# Samples of each data set that are looked at before training begins, so that a wrong one is not met hours later.
CHECKED = 2000
# Most frames of a fact sample, unless data.frames.choice.at_most allows fewer.
FACT_FRAMES = 32


def build_studies(
    config: DataConfig, tokenizer: TextTokenizer, image_size: int, tokens_per_frame: int, document_multiple: int,
    specialties: Sequence[Specialty] = (),
) -> StudySource:
    """The source of a valid configuration with a store or data sets; arguments as for `build_source`.

    Raises:
        UserError: no store, no series, no sample, or a sample that cannot be used.
    """
    store = VolumeStore(config.store) if config.store else None
    if store is not None and not len(store):
        raise UserError(f"data.store={config.store}: the store has no series; add some with tools/ingest.py SOURCE "
                        f"--out {config.store}", everywhere=True)
    training, held_out = _split(store, config.held_out)
    chosen = config.datasets or [_default(config.store)]
    datasets = [_open(entry, config, store, training, held_out) for entry in chosen]
    writer = ChatWriter(tokenizer, tokens_per_frame)
    matcher = Specialties(specialties)
    documents = Documents(writer, store, config.frames, image_size, config.seq_length, config.too_long, matcher)
    for dataset in datasets:
        if isinstance(dataset, FileSamples) and specialties:
            dataset.check_labels(matcher)
    if store is not None and specialties:
        _say_who_calls(matcher, store, training)
    packing = config.packing
    source = StudySource(
        datasets,
        [entry.weight for entry in chosen],
        documents,
        partial(_loader, config, image_size),
        StreamOptions(
            config.seed, document_multiple, packing.rows_per_block, packing.max_documents, config.accept_changes
        ),
        HeldOutSeries(store, held_out[:HELD_OUT_SERIES], _most_frames(config, HELD_OUT_FRAMES)) if store else None,
        _settings(config, tokenizer, tokens_per_frame, document_multiple, held_out),
    )
    source.check(CHECKED)
    return source


def _split(store: VolumeStore | None, share: float) -> tuple[list[str], list[str]]:
    """Names of the series to train on and of those that are held out, all of a patient's on one side."""
    if store is None:
        return [], []
    columns = (store.index.table[name].to_pylist() for name in ("series", "patient", "study"))
    patients = {series: patient or study or series for series, patient, study in zip(*columns, strict=True)}
    chosen = held_out_patients(set(patients.values()), share)
    held_out = [series for series, patient in patients.items() if patient in chosen]
    training = [series for series, patient in patients.items() if patient not in chosen]
    log.info("volume store: %d series of %d patients; %d series to train on, %d of %d patients held out",
             len(patients), len(set(patients.values())), len(training), len(held_out), len(chosen))
    if share and not chosen:
        log.warning("all series are of one patient: nothing is held out, whatever data.held_out=%g says", share)
    return training, held_out


def _say_who_calls(specialties: Specialties, store: VolumeStore, training: Sequence[str]) -> None:
    """Log how many series call each pool by their metadata, and warn of pools that none calls."""
    names = ("series", "modality", "body_part", "keywords")
    rows = zip(*(store.index.table[name].to_pylist() for name in names), strict=True)
    wanted, counts, has_keywords = set(training), [0] * (len(specialties.known) + 1), False
    for series, modality, body_part, keywords in rows:
        if series in wanted:
            info = SeriesInfo(modality=modality or "OT", body_part=body_part or "", keywords=tuple(keywords))
            has_keywords |= bool(info.keywords)
            called = specialties.of_series(info)
            for i in range(len(specialties.known)):
                counts[i] += called >> i & 1
            counts[-1] += not called
    pools = [specialty.name for specialty in specialties.known]
    log.info("series that call a pool of experts by their metadata: %s; %d call none",
             ", ".join(f"{name} {count}" for name, count in zip(pools, counts, strict=False)), counts[-1])
    if idle := [name for name, count in zip(pools, counts, strict=False) if not count]:
        log.warning("no series to train on calls %s by its metadata: see model.language.moe.pools.*.match",
                    " or ".join(idle))
    if not has_keywords and any(rule.keywords for specialty in specialties.known for rule in specialty.rules):
        log.warning("no series to train on has keywords, so rules with keywords hold for none; a store that was made "
                    "before there were any has to be ingested again, into a new one")


def _default(store: str) -> DatasetConfig:
    has_reports = _reports(store).is_file() and _reports(store).stat().st_size > 0
    return DatasetConfig(REPORTS, REPORTS) if has_reports else DatasetConfig(FACTS, FACTS)


def _reports(store: str) -> Path:
    return Path(store) / "samples.jsonl"


def _open(
    entry: DatasetConfig, config: DataConfig, store: VolumeStore | None, training: Sequence[str],
    held_out: Sequence[str],
) -> DataSet:
    if entry.path in (FACTS, REPORTS) and store is None:
        raise UserError(f"data set {entry.name}: path={entry.path} needs a volume store; set data.store, or give the "
                        "path of a JSON Lines file", everywhere=True)
    if entry.path == FACTS:
        assert store is not None
        return FactSamples(entry.name, store, training, config.seed, config.questions,
                           _most_frames(config, FACT_FRAMES))
    path = _reports(config.store) if entry.path == REPORTS else Path(entry.path).expanduser()
    return FileSamples(entry.name, load(path), store, frozenset(held_out))


def _most_frames(config: DataConfig, count: int) -> int:
    return min(count, config.frames.choice.at_most or count)


def _loader(config: DataConfig, image_size: int) -> FrameLoader:
    """The loader, for this rank's GPU where there is one: by now it has taken it."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return build_loader(config.frames, config.loader, image_size, device)


def _settings(
    config: DataConfig, tokenizer: TextTokenizer, tokens_per_frame: int, document_multiple: int,
    held_out: Sequence[str],
) -> dict[str, object]:
    """What decides which samples there are and how long they are, beside the samples themselves."""
    frames = {key: value for key, value in asdict(config.frames).items() if key not in ("augment", "interpolation")}
    return {
        "data.seed": config.seed,
        "data.seq_length": config.seq_length,
        "data.too_long": config.too_long,
        "data.questions": config.questions,
        "data.packing": asdict(config.packing),
        "data.frames": json.loads(json.dumps(frames)),
        "held-out series": hashlib.sha256(" ".join(held_out).encode()).hexdigest()[:16],
        "tokenizer": tokenizer.digest(),
        "tokens of a frame": tokens_per_frame,
        "documents are filled up to a multiple of": document_multiple,
    }

