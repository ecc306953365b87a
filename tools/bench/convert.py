"""Time conversion of a large model beside a copy of its files, and weigh its memory.

    python tools/bench/convert.py --dir /a/disk/with/room          # 8 GB with the layers of InternVL-26B

Makes a folder in the layout of the releases, of random numbers: InternViT-6B's and InternLM2-20B's layers at their
widths, as many as --gigabytes holds, with all words. Then, turn by turn: `cp` of its weights, import, `cp`, export of
what was imported; each in a process of its own, whose peak of resident memory is what the system says. Files are synced
to the disk on all sides. Before each of them the page cache is brought to one state: it has what is read, and of the
other files nothing; else whoever comes second pays for clearing up after the first. At the end the exported files are
compared with the first ones, byte by byte. It needs about four times the size on the disk, and twice as memory.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONVERT = ROOT / "tools" / "convert.py"
VISION = dict(
    architectures=["InternVisionModel"], model_type="intern_vit_6b", hidden_size=3200, intermediate_size=12800,
    num_attention_heads=25, image_size=448, patch_size=14, qkv_bias=False, qk_normalization=True, norm_type="rms_norm",
)  # fmt: skip
LANGUAGE = dict(
    architectures=["InternLM2ForCausalLM"], model_type="internlm2", hidden_size=6144, intermediate_size=16384,
    num_attention_heads=48, num_key_value_heads=8, vocab_size=92553, rms_norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
SMALL = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, metavar="DIR", help="where it is done; emptied afterwards")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the model (default: 8)")
    parser.add_argument("--repetitions", type=int, default=3, help="turns (default: 3)")
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, help="most of a file (default: 5)")
    parser.add_argument("--small", action="store_true", help="narrow layers, to try the benchmark itself")
    return parser.parse_args()


def make(folder: Path, args: argparse.Namespace) -> tuple[int, int]:
    """Write the folder; bytes of all tensors and of the largest one."""
    sys.path.insert(0, str(ROOT))
    import torch

    import megamed.runtime  # noqa: F401  makes Megatron importable
    from megamed.checkpoint.hf.names import name_of
    from megamed.checkpoint.hf.source import INDEX
    from megamed.checkpoint.hf.target import plan_files, write_safetensors
    from megamed.checkpoint.rewrite import Piece, one_process, outline
    from megamed.models.families import family_of

    vision, language = dict(VISION), dict(LANGUAGE)
    if args.small:
        vision |= SMALL | {"image_size": 28, "patch_size": 7}
        language |= SMALL | {"num_key_value_heads": 2, "vocab_size": 500}
    # Layers of both in the proportion of the whole model, 45 to 48, so that nearly all bytes are in layers.
    layers = 1
    while True:
        config = {
            "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "torch_dtype": "bfloat16",
            "vision_config": {**vision, "num_hidden_layers": layers},
            "llm_config": {**language, "num_hidden_layers": layers},
        }  # fmt: skip
        model = family_of(config).read_config(config, ())
        with one_process() as mesh:
            pieces = [piece for piece in outline(model, mesh, torch.bfloat16) if isinstance(piece, Piece)]
        if sum(piece.num_bytes for piece in pieces) > args.gigabytes * 1e9 or layers == 45:
            break
        layers += 1
    table = family_of(config).table(model, "internlm2", ())
    shapes = {}
    for piece in pieces:
        whole = piece.whole[len(piece.stack) :]
        found = table.of_ours(name_of(piece.name, piece.stack))
        assert found is not None
        for name, rows in zip(found.theirs, found.line.joined(whole[0]).sizes(), strict=True):
            shapes[name] = ((rows, *whole[1:]), torch.bfloat16)
    plan, index = plan_files(shapes, int(args.shard_gigabytes * 1e9))

    def random(name: str) -> torch.Tensor:
        return torch.randint(-(2**15), 2**15, shapes[name][0], dtype=torch.int16).view(torch.bfloat16)

    def beside(aside: Path) -> None:
        (aside / "config.json").write_text(json.dumps(config))
        if index is not None:
            (aside / INDEX).write_text(index)

    write_safetensors(folder, plan, random, "benchmark", beside)
    sizes = [torch.Size(shape).numel() * 2 for shape, _ in shapes.values()]
    print(f"{layers} + {layers} layers in {len(plan)} files", file=sys.stderr)
    return sum(sizes), max(sizes)


# Starts a command and says its peak memory. The system counts a program's memory before it starts another as the
# other's, so what starts it has to be small itself.
_WATCH = """
import resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds of a command, and its peak of resident memory in bytes."""
    done = subprocess.run([sys.executable, "-S", "-c", _WATCH, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed with code {done.returncode}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def settle(source: Path, folders: Iterable[Path]) -> None:
    """Have one of some folders in the page cache, and the others not."""
    for folder in folders:
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for path in (path for path in source.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file:
            while file.read(2**24):
                pass


def copy(folder: Path, to: Path) -> float:
    """Seconds of `cp` and `sync` of the weights."""
    to.mkdir()
    files = [str(path) for path in sorted(folder.glob("*.safetensors"))]
    return timed(["sh", "-c", 'to=$1; shift; cp "$@" "$to" && sync "$to"/*', "sh", str(to), *files])[0]


def main(args: argparse.Namespace) -> None:
    import platform

    import torch
    from tqdm import tqdm

    folder, checkpoint, back, copied = (args.dir / name for name in ("hf", "checkpoint", "back", "copy"))
    args.dir.mkdir(parents=True, exist_ok=True)
    total, largest = make(folder, args)
    base = timed([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
                  "import megamed.checkpoint.hf.convert, megamed.train.run"])  # fmt: skip
    ratios: dict[str, list[float]] = {"import": [], "export": []}
    peaks: dict[str, list[int]] = {"import": [], "export": []}
    for _ in tqdm(range(args.repetitions), desc="turns", unit="turn", disable=None):
        for what, source, to in (("import", folder, checkpoint), ("export", checkpoint, back)):
            shutil.rmtree(to, ignore_errors=True)
            kept = (folder, checkpoint, back)
            settle(folder, kept)
            seconds_of_copy = copy(folder, copied)
            shutil.rmtree(copied)
            settle(source, kept)
            seconds, peak = timed([sys.executable, str(CONVERT), what, str(source), "--to", str(to)])
            ratios[what].append(seconds / seconds_of_copy)
            peaks[what].append(peak)
    same = all(filecmp.cmp(path, back / path.name, shallow=False) for path in folder.iterdir())
    print(f"{os.cpu_count()}-core {platform.machine()} machine; Python {platform.python_version()}, torch "
          f"{torch.__version__}; {total / 1e9:.1f} GB of bf16, the largest tensor {largest / 1e9:.2f} GB")
    print(f"peak memory of the program's imports alone: {base[1] / 1e9:.2f} GB\n")
    print("| | time / cp, median (range) | peak memory | beyond the imports, in largest tensors |\n|---|---|---|---|")
    for what in ratios:
        peak, values = max(peaks[what]), ratios[what]
        print(f"| {what} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) | "
              f"{peak / 1e9:.2f} GB | {(peak - base[1]) / largest:.2f} |")
    print(f"\nexported files are {'the same' if same else 'NOT the same'}, byte by byte")
    for path in (folder, checkpoint, back):
        shutil.rmtree(path)


if __name__ == "__main__":
    main(parse())
