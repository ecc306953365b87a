"""Take some pools of specialists out of a mixture of experts: a smaller checkpoint that stands by itself.

    python tools/extract_specialist.py MOE --pools chest [neuro ...] --to OUT

MOE is a checkpoint, or the folder of a run, whose newest one is taken. OUT is a checkpoint of weights alone with the
named pools, the general pool, shared experts, and all that is no expert; `init.checkpoint=OUT` starts a run from it.
For tokens that call all pools that were named, it computes what the whole model does with
`model.language.moe.routing=hard`. `moe.yaml` in it has its experts' settings, and the last line that is printed is
the command that trains it; rules that match studies stay in the configuration of the run that MOE is of.

It takes one process, no GPU, and host memory for the largest matrix a few times over. Experts that are left out are
not read. Whatever happens to it, OUT is there whole or not at all.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megamed.utils import UserError
from megamed.utils.command import exit_code

if TYPE_CHECKING:
    from megamed.models.vlm import VLMConfig

CONF = Path(__file__).resolve().parents[1] / "conf"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moe", type=Path, metavar="MOE", help="checkpoint of a model with pools")
    parser.add_argument("--pools", nargs="+", required=True, metavar="POOL", help="to keep, beside the general one")
    parser.add_argument("--to", required=True, type=Path, metavar="OUT", help="the new checkpoint's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    return parser.parse_args()


def with_hard_routing(config: "VLMConfig") -> "VLMConfig":
    """The settings with which the smaller model computes what the whole one does for its pools' tokens."""
    from megamed.checkpoint import specialist_settings
    from megamed.checkpoint.specialists import with_moe

    hard = with_moe(config, replace(config.language.moe, routing="hard"))
    try:
        specialist_settings.check(hard)
    except UserError:  # one of the pools alone is too small for it
        return config
    return hard


def run(args: argparse.Namespace) -> None:
    """Make the checkpoint, and say how to train it."""
    from megamed.checkpoint import find_checkpoint, model_of, rewrite, specialist_settings, specialists
    from megamed.checkpoint.hf.sidecar import carry_sidecar
    from megamed.checkpoint.weights import Weights
    from megamed.train.run import versions
    from megamed.utils import log

    log.setup(0)
    rewrite.check_target(args.to, args.overwrite)
    checkpoint = find_checkpoint(args.moe, "MOE")
    weights = Weights(checkpoint)
    whole = specialists.as_stored(model_of(checkpoint), weights)
    config = specialists.some_pools(whole, args.pools, str(checkpoint))
    moe = config.language.moe
    make = specialists.Extract(weights, whole.language.moe.resolved, moe.resolved)
    shown = with_hard_routing(config)
    with rewrite.one_process() as mesh:
        pieces = rewrite.outline(config, mesh, weights.dtype("language.embedding.word_embeddings.weight"))
        beside = {specialist_settings.MOE_FILE: specialist_settings.moe_yaml(shown.language.moe)}
        card, carry = rewrite.make_card(config, versions()), partial(carry_sidecar, checkpoint)
        size = rewrite.write_weights(args.to, pieces, make, card, beside, prepare=carry)
    print(
        f"{args.to}: {size / 2**20:,.1f} MiB, {moe.total_experts} of {whole.language.moe.total_experts} experts a "
        f"layer ({moe.resolved})"
    )
    print("Train it with the settings of your model and data, and:\n")
    print(specialist_settings.instructions(shown, args.to, CONF, []))


def main() -> int:
    args = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: shapes are made where no GPU is
    return exit_code(partial(run, args), f"nothing is left of {args.to}")


if __name__ == "__main__":
    sys.exit(main())
