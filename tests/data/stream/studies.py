"""A small volume store with series of several kinds and patients, and samples about them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megamed.data import DataConfig, DatasetConfig, StudySource, build_source, load_tokenizer
from megamed.data.privacy import Pseudonyms
from megamed.data.readers import Identity
from megamed.data.series import PERCENTILES, Series, SeriesInfo
from megamed.data.store import StoreWriter, VolumeStore, write_series

PSEUDONYMS = Pseudonyms(b"a key for tests only")
TOKENIZER = load_tokenizer("bytes")
SIZE, TOKENS_PER_FRAME = 28, 4

# Number of the patient, and what is known of the series.
SERIES: tuple[tuple[int, dict[str, Any]], ...] = (
    (0, dict(modality="CT", kind="volume", plane="axial", units="HU", body_part="CHEST", contrast=True)),
    (0, dict(modality="CT", kind="volume", plane="coronal", units="HU", body_part="CHEST")),
    (1, dict(modality="MR", kind="volume", plane="sagittal", body_part="BRAIN")),
    (2, dict(modality="CT", kind="volume", plane="axial", units="HU", body_part="HEAD", contrast=False)),
    (3, dict(modality="DX", kind="image", view_position="PA", body_part="CHEST")),
    (4, dict(modality="MR", kind="run", plane="axial", repetition_time_s=2.0)),
    (5, dict(modality="CT", kind="volume", plane="axial", units="HU")),
    (6, dict(modality="DX", kind="image", view_position="LL")),
    (7, dict(modality="CT", kind="volume", plane="axial", units="HU", body_part="ABDOMEN")),
)
SHAPES = {"volume": (1, 12, 20, 24), "run": (6, 4, 16, 16), "image": (1, 1, 40, 32)}


def name(number: int) -> str:
    return PSEUDONYMS.of("series", f"number {number}")


def make_store(root: Path, series: tuple[tuple[int, dict[str, Any]], ...] = SERIES) -> VolumeStore:
    store = VolumeStore.create(root)
    with StoreWriter(store) as writer:
        for number, (patient, known) in enumerate(series):
            shape = SHAPES[known["kind"]]
            voxels = np.random.default_rng(number).integers(-1000, 1000, shape).astype(np.int16)
            found = {str(p): float(np.percentile(voxels, p)) for p in PERCENTILES}
            info = SeriesInfo(shape=shape, dtype="int16", spacing_mm=(1.0, 1.0, 5.0), percentiles=found, **known)
            identity = Identity(f"patient{patient}", f"study{patient}", name(number), "", "")
            writer.commit(write_series(store.root, name(number), identity, Series(voxels, info), PSEUDONYMS))
    return VolumeStore(root)


def make_samples(path: Path, count: int = 60, seed: int = 3) -> Path:
    """Questions about studies, and text alone."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for number in range(count):
        question, answer = f"What is number {number}?", "It is " + "a finding " * int(rng.integers(1, 12))
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        kind = number % 4
        if kind == 0:
            lines.append({"messages": [{"role": "system", "content": "Be brief."}, *turns]})
            continue
        shown = {"series": name(int(rng.integers(len(SERIES)))), "frames": {"at_most": int(rng.integers(1, 9))}}
        if kind == 3:
            turns[0]["content"] = f"<study>{question}"
        lines.append({"messages": turns, "studies": [shown]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(store: Path, samples: Path | None = None, **values: Any) -> DataConfig:
    """Of a store, and of its facts and some samples where there are any."""
    settings: dict[str, Any] = {"store": str(store), "seq_length": 512, "held_out": 0.25, **values}
    made = DataConfig(**settings)
    made.packing.rows_per_block = 8
    made.frames.choice.at_most = 12
    if samples is not None:
        made.datasets = [DatasetConfig("talk", str(samples), 2.0), DatasetConfig("facts", "facts")]
    return made


def source(made: DataConfig, document_multiple: int = 1) -> StudySource:
    built = build_source(made, TOKENIZER, SIZE, TOKENS_PER_FRAME, document_multiple)
    assert isinstance(built, StudySource)
    return built
