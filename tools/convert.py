"""Hugging Face models to checkpoints of megamed, and back.

    python tools/convert.py import HF_DIR --to CKPT          # no GPU, memory for two of the largest tensors
    python tools/convert.py export CKPT --to HF_DIR [--dtype bf16]
    python tools/convert.py verify HF_DIR CKPT               # every tensor bit by bit, and logits beside transformers'

HF_DIR is the folder of a model on this machine: an InternVL release with code of its own (1.5, 2, 2.5, 3, 3.5), or one
in the format of transformers. CKPT is a checkpoint, or for export and verify the folder of a run, whose newest one is
taken; it can be trained from at any layout (`init.checkpoint=CKPT`). Configuration, tokenizer, preprocessor, code and
whatever else lies beside the weights go with the model, and an export gives them back byte by byte.

Files are there under their name when they are complete. Stopped at any moment, the same command goes on where it was.
Exit code: 0, 1 if verify finds a difference, 2 for what you can mend, 130 after Ctrl-C.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megamed.utils import UserError
from megamed.utils.command import exit_code

if TYPE_CHECKING:
    from megamed.checkpoint.hf.convert import Folder

# Above this, in fp32, logits are not the same model's: both sides sum some thousands of products in another order.
LOGITS_TOLERANCE = 1e-3


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reads = commands.add_parser("import", help="a Hugging Face folder to a checkpoint")
    reads.add_argument("folder", type=Path, metavar="HF_DIR")
    reads.add_argument("--to", required=True, type=Path, metavar="CKPT", help="the new checkpoint's folder")
    reads.add_argument("--layout", metavar="tensor=4,pipeline=2",
                       help="check that the model can be trained at a layout; the checkpoint fits every layout")
    writes = commands.add_parser("export", help="a checkpoint to a Hugging Face folder")
    writes.add_argument("checkpoint", type=Path, metavar="CKPT")
    writes.add_argument("--to", required=True, type=Path, metavar="HF_DIR", help="the new folder")
    writes.add_argument("--dtype", choices=["fp32", "bf16", "fp16"],
                        help="of the weights (default: as in the folder that the model came from)")
    for command in (reads, writes):
        command.add_argument("--overwrite", action="store_true", help="replace what is there")
    verify = commands.add_parser("verify", help="compare a folder with a checkpoint")
    verify.add_argument("folder", type=Path, metavar="HF_DIR")
    verify.add_argument("checkpoint", type=Path, metavar="CKPT")
    verify.add_argument("--no-logits", action="store_true", help="tensors alone; logits need both models in fp32")
    verify.add_argument("--image", type=Path, metavar="FILE", help="a picture (default: a CT slice that pydicom has)")
    verify.add_argument("--text", default="Describe the findings in this image.", help="the words behind the picture")
    return parser.parse_args()


def run_import(args: argparse.Namespace) -> None:
    """HF_DIR to CKPT."""
    from megamed.checkpoint import rewrite
    from megamed.checkpoint.hf.convert import import_folder, open_folder
    from megamed.train.run import versions

    rewrite.check_target(args.to, args.overwrite)
    if args.layout:
        check_layout(open_folder(args.folder), args.layout)
    model, size = import_folder(args.folder, args.to, versions())
    language = model.language
    experts = f", {language.moe.num_experts} experts a layer" if language.moe.num_experts else ""
    print(f"{args.to}: {size / 2**20:,.1f} MiB; {model.vision.num_layers} + {language.num_layers} layers{experts}")
    print(f"Train it: torchrun ... launch/pretrain.py +exp=... init.hf={args.folder}   (reads the folder itself)")
    print(f"          cp {args.to}/model.yaml conf/model/NAME.yaml; ... model=NAME init.checkpoint={args.to}")


def check_layout(folder: "Folder", text: str) -> None:
    """Check that a model divides by a layout, as training would.

    Raises:
        UserError: names the size that does not, or the word that is no axis.
    """
    from dataclasses import fields

    from megamed.config.load import did_you_mean
    from megamed.runtime import ParallelConfig

    axes = {field.name for field in fields(ParallelConfig)}
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        axis, _, size = pair.strip().partition("=")
        if axis not in axes or not size.isdigit():
            hint = did_you_mean(axis, axes) or "write for instance tensor=4,pipeline=2"
            raise UserError(f"--layout: {pair!r} is no axis=size; {hint}")
        sizes[axis] = int(size)
    folder.model.language.validate(ParallelConfig(**{"sequence": sizes.get("tensor", 1) > 1, **sizes}))  # type: ignore[arg-type]


def run_export(args: argparse.Namespace) -> None:
    """CKPT to HF_DIR."""
    from megamed.checkpoint import find_checkpoint
    from megamed.checkpoint.hf.convert import export_folder

    target = args.to
    if target.exists() and any(target.iterdir()):
        if not (target / "config.json").is_file():
            raise UserError(f"--to {target}: is there, and is no Hugging Face folder; name another folder")
        if not args.overwrite:
            raise UserError(f"--to {target}: is there already; name another folder, or replace it with --overwrite")
    size = export_folder(find_checkpoint(args.checkpoint, "CKPT"), target, args.dtype)
    print(f"{target}: {size / 2**20:,.1f} MiB")


def run_verify(args: argparse.Namespace) -> int:
    """The table; 1 if anything differs."""
    from tqdm import tqdm

    from megamed.checkpoint import find_checkpoint
    from megamed.checkpoint.hf.convert import open_folder
    from megamed.checkpoint.hf.verify import compare

    folder, checkpoint = open_folder(args.folder), find_checkpoint(args.checkpoint, "CKPT")
    found = list(
        tqdm(compare(folder, checkpoint), total=len(folder.source.names), desc="tensors", unit="tensor", disable=None)
    )
    others = [x for x in found if not x.is_same]
    print("| what | compared | the same | largest difference |\n|---|---|---|---|")
    largest = max((x.difference for x in found), default=0.0)
    print(f"| tensors | {len(found):,} | {len(found) - len(others):,} | {largest:.3g} |")
    differs = bool(others)
    if not args.no_logits:
        from convert_logits import differences

        for what, number, largest in differences(folder, checkpoint, args.image, args.text):
            differs |= not largest <= LOGITS_TOLERANCE
            is_same = number if largest <= LOGITS_TOLERANCE else 0
            print(f"| {what} | {number:,} | {is_same:,} within {LOGITS_TOLERANCE:g} | {largest:.3g} |")
    for x in others[:10]:
        print(f"{x.name}: differs by up to {x.difference:.3g}")
    if len(others) > 10:
        print(f"... and {len(others) - 10:,} further tensors")
    return int(differs)


def main() -> int:
    args = parse()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: nothing here needs a GPU
    from megamed.utils import log

    log.setup(0, level="WARNING")
    commands = {"import": run_import, "export": run_export, "verify": run_verify}
    codes: list[int] = []
    code = exit_code(
        lambda: codes.append(commands[args.command](args) or 0), "run the same command again to go on"
    )
    return code or codes[0]


if __name__ == "__main__":
    sys.exit(main())
