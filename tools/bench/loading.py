"""Slices per second into training tensors, frames_NCHW in float32 through three CT windows: megamed beside MONAI.

    python tools/bench/loading.py                          real CT series where they are, else one that is made up
    python tools/bench/loading.py --dicom FOLDER FOLDER    folders of one CT series each
    python tools/bench/loading.py --backend dali           megamed's other loader

Cold: from DICOM files. Warm: from volumes on a disk, megamed's from its volume store, MONAI's from each of three forms.
Turn by turn in one run on the same series, with the same result, which is compared first; MONAI's transforms in a
PyTorch DataLoader with each number of workers, and megamed against the best of them. Files come from the system's
cache on both sides: what is timed is reading and computing, not a disk.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from megamed.utils.command import positive

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = ("ct_head_ge/In/GE", "ct_phantom/In/Philips/S21570/S2010")

# Of normalised frames, whose white is 4.4 above their black. Inside: sums in another order, and weights that torch
# computes in float32. At a frame's rim torch leaves out what is beyond the edge, where megamed repeats the edge.
INSIDE, RIM = 2e-3, 0.5
RIM_PIXELS = 3

OURS = "megamed"
WARM = f"{OURS}, warm"
ALONE = ", 0 workers"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dicom", type=Path, nargs="+", metavar="FOLDER", help="folders of one CT series each")
    parser.add_argument("--synthetic", type=positive, nargs=2, metavar=("SLICES", "PIXELS"),
                        help="a series that is made up, of so many slices and so many pixels along each edge")
    parser.add_argument("--size", type=positive, default=448, help="edge of a frame in pixels (default: 448)")
    parser.add_argument("--series", type=positive, default=4, help="series loaded in one turn (default: 4)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2],
                        help="processes of the DataLoader, and of megamed's DICOM reader (default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=0, help="of megamed's loader (default: one a core)")
    parser.add_argument("--backend", choices=["auto", "numpy", "dali"], default="auto", help="megamed's loader")
    parser.add_argument("--stages", nargs="+", choices=["cold", "warm", "other"], default=["cold", "warm", "other"],
                        help="what is timed (default: all)")
    parser.add_argument("--repetitions", type=positive, default=7, help="timed turns of each side (default: 7)")
    parser.add_argument("--warmup", type=int, default=0, help="turns before them (default: 0)")
    return parser.parse_args(arguments)


def find_series(args: argparse.Namespace, scratch: Path) -> list[Path]:
    """Folders of DICOM files: those given, the real ones, or one that is written."""
    real = [SHARED / name for name in REAL if (SHARED / name).is_dir()]
    if args.dicom:
        return args.dicom
    if real and not args.synthetic:
        return real
    num_slices, edge = args.synthetic or (28, 512)
    return [write_series(scratch / "dicom", num_slices, edge)]


def write_series(folder: Path, num_slices: int, edge: int) -> Path:
    """An axial CT series of a head of water with a skull, and noise."""
    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir()
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:edge, :edge] / edge - 0.5
    radius = np.hypot(x, y)
    hounsfield = np.select([radius < 0.35, radius < 0.4], [30.0, 1200.0], -1000.0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for index in range(num_slices):
        values = np.clip(hounsfield + rng.normal(0, 15, (edge, edge)), -1024, 3000).astype(np.int16) + 1024
        file = Dataset()
        file.file_meta = FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = CTImageStorage
        file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study, series, frame
        file.Modality, file.BodyPartExamined, file.InstanceNumber = "CT", "HEAD", index + 1
        file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        file.ImageOrientationPatient, file.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-115, -115, 5 * index]
        file.PixelSpacing, file.SliceThickness = [230 / edge, 230 / edge], 5
        file.Rows = file.Columns = edge
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
        file.RescaleIntercept, file.RescaleSlope, file.RescaleType = -1024, 1, "HU"
        file.PixelData = values.astype("<u2").tobytes()
        file.save_as(folder / f"{index}.dcm", enforce_file_format=True)
    return folder


def ingest(folder: Path, voxels_path: Path) -> Any:
    """A folder of DICOM files to a volume as the store has it. Returns its `SeriesInfo`."""
    import numpy as np

    from megamed.data.privacy import Pseudonyms
    from megamed.data.readers.base import Refusal
    from megamed.data.readers.dicom import DicomReader

    reader, pseudonyms, headers = DicomReader(), Pseudonyms(b"\0" * 32), []
    for path in sorted(folder.iterdir()):
        try:
            headers.append(reader.metadata(path, pseudonyms))
        except Refusal:  # an index or a note beside the slices
            continue
    (plan,) = reader.group(headers).plans
    series = reader.read(plan)
    np.save(voxels_path, series.voxels_TSHW)
    return series.info


class Ours:
    """megamed's side.

    Args:
        folders: of the series' DICOM files.
        args: the command line.
        scratch: a folder for volumes.
    """

    def __init__(self, folders: Sequence[Path], args: argparse.Namespace, scratch: Path):
        from megamed.data.frames import FramesConfig, LoaderConfig
        from megamed.data.frames.config import ChoiceConfig
        from megamed.data.frames.loader import build_loader

        # MONAI has no cubic kernel that weighs all pixels; torch's linear one is the same as megamed's.
        self.config = FramesConfig(interpolation="linear", choice=ChoiceConfig(at_most=None))
        self.loader = build_loader(self.config, LoaderConfig(args.backend, threads=args.threads), args.size)
        self.folders = folders
        self.paths = [scratch / f"ours{number}.npy" for number in range(len(folders))]
        self.infos = [ingest(folder, path) for folder, path in zip(folders, self.paths, strict=True)]
        self.windows = [self.plan(number)[0].windows for number in range(len(folders))]

    def plan(self, number: int) -> list[Any]:
        from megamed.data.frames.plan import plan_series
        from megamed.data.samples.schema import StudyRef

        return plan_series(self.infos[number], self.paths[number], StudyRef(""), self.config).frames

    def warm(self, order: Sequence[int]) -> None:
        for number in order:
            self.loader.load(self.plan(number))

    def cold(self, order: Sequence[int], pool: ProcessPoolExecutor | None, scratch: Path) -> None:
        """Each item is read from its files, also where it was read before."""
        from megamed.data.frames.plan import plan_series
        from megamed.data.samples.schema import StudyRef

        read = pool.map if pool else map
        folders = [self.folders[number] for number in order]
        paths = [scratch / f"cold{item}.npy" for item in range(len(order))]
        for path, info in zip(paths, read(ingest, folders, paths), strict=True):
            self.loader.load(plan_series(info, path, StudyRef(""), self.config).frames)


def compare_results(ours: Ours, forms: Sequence[Any]) -> str:
    """Check that every form makes megamed's frames. Returns how far they are apart.

    Raises:
        RuntimeError: one does not.
    """
    import loading_monai

    inner = slice(RIM_PIXELS, -RIM_PIXELS)
    farthest = {"inside": 0.0, "rim": 0.0}
    for form in forms:
        found = list(loading_monai.loader(form, range(len(ours.folders)), 0))
        for number, theirs in enumerate(found):
            apart = (ours.loader.load(ours.plan(number)) - theirs[loading_monai.KEY]).abs()
            inside, everywhere = float(apart[..., inner, inner].max()), float(apart.max())
            if inside > INSIDE or everywhere > RIM:
                raise RuntimeError(f"the sides differ: {form.name} by {inside:g} inside and {everywhere:g} at the rim")
            farthest = {"inside": max(farthest["inside"], inside), "rim": max(farthest["rim"], everywhere)}
    return f"frames of both sides are at most {farthest['inside']:.1g} apart, at the rim {farthest['rim']:.1g}"


def _cold(ours: Ours, order: Sequence[int], pool: ProcessPoolExecutor | None, scratch: Path, _: int) -> None:
    ours.cold(order, pool, scratch)


def run_epoch(loader: Any, _: int) -> None:
    for _frames in loader:
        pass


def report(times: dict[str, Any], stages: dict[str, str], ratio: Callable[..., tuple[float, float, float]]) -> None:
    """How many times as many slices per second megamed makes: as each form of a stage, and as the best of them.

    By wall time each side has the number of workers that it is fastest with. Processor time is that of one process
    without workers, so it does not count what else the machine does.
    """

    def median(name: str) -> float:
        return statistics.median(times[name].wall)

    def text(clock: str, theirs: str, ours: str) -> str:
        return "{:.2f} ({:.2f} to {:.2f})".format(*ratio(getattr(times[theirs], clock), getattr(times[ours], clock)))

    for stage in dict.fromkeys(stages.values()):
        names = [name for name, its in stages.items() if its == stage]
        theirs = [name for name in names if not name.startswith(OURS)]
        # What is neither cold nor a volume on a disk is compared with megamed's frames from a disk.
        all_ours = [name for name in names if name.startswith(OURS)] or [WARM]
        ours, alone = min(all_ours, key=median), next((n for n in all_ours if n.endswith(ALONE)), WARM)
        for name in theirs:
            cpu = f", by processor time {text('cpu', name, alone)}" if name.endswith(ALONE) else ""
            print(f"{text('wall', name, ours):>22s} times the slices per second of MONAI, {stage}: {name}{cpu}")
        if stage != "other" and theirs:
            best = min(theirs, key=median)
            print(f"{ours} has {text('wall', best, ours)} times the speed of MONAI at its best, {best}")
            unaided = [name for name in theirs if name.endswith(ALONE)]
            if unaided:
                best = min(unaided, key=lambda name: statistics.median(times[name].cpu))
                print(f"{alone} has {text('cpu', best, alone)} times the speed by processor time, {best}")


def measure(args: argparse.Namespace, scratch: Path) -> None:
    import loading_monai
    import torch
    from train_step import environment, ratio, take_turns

    folders = find_series(args, scratch)
    pools = {workers: ProcessPoolExecutor(workers) if workers else None for workers in args.workers}
    for pool in pools.values():  # they start before there are threads
        if pool:
            list(pool.map(abs, range(8)))
    ours = Ours(folders, args, scratch)
    forms = [f for f in loading_monai.forms(folders, ours.windows, args.size, scratch) if f.stage in args.stages]
    order = [item % len(folders) for item in range(args.series)]
    num_slices = sum(len(ours.plan(number)) for number in order)
    print(environment())
    print(f"{num_slices} slices a turn from {len(folders)} series, frames of {args.size} x {args.size}, "
          f"{torch.get_num_threads()} threads; megamed's loader: {type(ours.loader).__name__}")
    print(compare_results(ours, forms), flush=True)

    sides: dict[str, Callable[[int], Any]] = {WARM: lambda _: ours.warm(order)}
    stages = {WARM: "warm"}
    if "cold" in args.stages:
        for workers, pool in pools.items():
            name = f"{OURS}, cold, {workers} workers"
            sides[name] = partial(_cold, ours, order, pool, scratch)
            stages[name] = "cold"
    for form in forms:
        for workers in args.workers:
            name = f"{form.name}, {workers} workers"
            sides[name] = partial(run_epoch, loading_monai.loader(form, order, workers))
            stages[name] = form.stage
    # Before each timed pass one that does not count: the others' turns are long enough to push what a side needs out of
    # the caches.
    turns = {f"{prefix}{name}": side for name, side in sides.items() for prefix in ("before ", "")}
    report(take_turns(turns, args.warmup, args.repetitions), stages, ratio)


def main(args: argparse.Namespace) -> None:
    import os
    import warnings

    import torch

    warnings.filterwarnings("ignore")  # what MONAI says of packages that are optional
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch))


if __name__ == "__main__":
    parsed = parse()  # before the imports, so that --help and a misspelt option answer at once
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from megamed.runtime.process import run

    run(lambda: main(parsed))
