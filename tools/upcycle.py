"""Make specialists: of a dense model that becomes a mixture of experts, or of several that become its pools.

    python tools/upcycle.py --from DENSE --to MOE --pools general=4 chest=4 neuro=4 [--top-k 2] [--routing soft]
    python tools/upcycle.py --from DENSE --to MOE --pools conf/model/moe/specialists.yaml
    python tools/upcycle.py --merge general=BASE chest=CKPT_A neuro=CKPT_B --to MOE [--experts N]

DENSE, BASE, CKPT_A and CKPT_B are checkpoints, or folders of runs, whose newest one is taken. MOE is a checkpoint of
weights alone, which `init.checkpoint=MOE` starts a run from, at any layout; `moe.yaml` in it has its experts'
settings, and the last lines that are printed are the command that trains it.

With --from, the new model computes what the dense one does, before its first step: every expert is a copy of the
dense MLP. A shared expert (--shared N) takes N of its neurons, and each routed expert the others; with --width as in
the dense model, the shared expert starts with an output of zero instead. --noise and --reinit make experts differ
from the start, and the new model is then no longer the dense one.

With --merge (Branch-Train-MiX, arXiv:2403.07816), models of one size that were trained separately from one ancestor
become pools, of one expert or of N copies each. Their MLPs are the experts; attention, norms, embeddings, vision
tower and projector are the averages of all of them. Routers are new, and are best trained alone for some steps
(`optim.router_warmup_steps`).

It takes one process, no GPU, and host memory for the largest matrix a few times over, not for a model: parameters
are read, made and written one after the other. Whatever happens to it, MOE is there whole or not at all.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megamed.utils import UserError
from megamed.utils.command import exit_code, positive

if TYPE_CHECKING:
    from megamed.models.moe import MoEConfig
    from megamed.models.vlm import VLMConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
ROUTER_WARMUP_STEPS = 200


def share(text: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError(text)
    return float(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="dense", type=Path, metavar="DENSE", help="a dense model's checkpoint")
    source.add_argument("--merge", nargs="+", metavar="POOL=CKPT", help="dense models' checkpoints, one a pool")
    parser.add_argument("--to", required=True, type=Path, metavar="MOE", help="the new checkpoint's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--pools", nargs="+", metavar="POOL=SIZE", help="pools, or a file like those in conf/model/moe")
    parser.add_argument("--experts", type=positive, default=1, metavar="N", help="--merge: experts a pool (default: 1)")
    parser.add_argument("--top-k", type=positive, metavar="K", help="experts a token is sent to (default: 2)")
    parser.add_argument("--routing", choices=["free", "soft", "hard"], help="what specialties decide (default: soft)")
    parser.add_argument("--shared", type=int, metavar="N", help="width of the shared expert (default: 0, none)")
    parser.add_argument("--width", type=positive, metavar="N",
                        help="width of an expert (default: the dense MLP's, less the shared expert's)")
    parser.add_argument("--first-dense-layers", type=int, metavar="N", help="layers at the bottom that stay dense")
    parser.add_argument("--noise", type=float, default=0.0, metavar="STD",
                        help="added to each expert's weights, relative to their standard deviation")
    parser.add_argument("--reinit", type=share, default=0.0, metavar="SHARE",
                        help="of each expert's neurons that are drawn anew (Drop-Upcycling, arXiv:2502.19261)")
    parser.add_argument("--seed", type=int, default=1234, help="of routers, noise and new neurons (default: 1234)")
    args = parser.parse_args()
    if args.dense and not args.pools:
        parser.error("--from needs --pools")
    if args.merge and (args.pools or args.shared or args.width):
        parser.error("with --merge, the pools are the checkpoints', and experts are as wide as their MLPs: leave out "
                     "--pools, --shared and --width")  # fmt: skip
    return args


def settings(args: argparse.Namespace, model: "VLMConfig") -> "MoEConfig":
    """The new model's experts."""
    from megamed.checkpoint import specialist_settings
    from megamed.models.moe import MoEConfig, PoolConfig

    width = model.language.intermediate_size
    is_file = bool(args.dense) and len(args.pools) == 1 and "=" not in args.pools[0]
    if args.merge:
        pools = {name: PoolConfig(args.experts) for name in sources(args)}
        moe = MoEConfig(pools=pools, intermediate_size=width)
    elif is_file:
        moe = specialist_settings.read_moe(Path(args.pools[0]), model)
    else:
        pools = specialist_settings.pools_of(args.pools)
        moe = MoEConfig(pools=pools, intermediate_size=width - max(args.shared or 0, 0))
    if moe.resolved.specialties and not is_file:
        moe.routing = "soft"
    given = {
        "top_k": args.top_k,
        "routing": args.routing,
        "shared_intermediate_size": args.shared,
        "intermediate_size": args.width,
        "first_dense_layers": args.first_dense_layers,
    }
    for key, value in given.items():
        if value is not None:
            setattr(moe, key, value)
    return moe


def sources(args: argparse.Namespace) -> dict[str, Path]:
    """Checkpoints by pool; one under no name for --from."""
    from megamed.checkpoint import find_checkpoint
    from megamed.checkpoint.specialist_settings import parse_pairs

    if args.dense:
        return {"": find_checkpoint(args.dense, "--from")}
    pairs = parse_pairs(args.merge, "--merge", "CHECKPOINT", "runs/chest")
    return {name: find_checkpoint(Path(path), f"--merge {name}") for name, path in pairs.items()}


def check_alike(checkpoints: dict[str, Path]) -> None:
    """Check that all models have the same sizes."""
    from megamed.checkpoint import read_card
    from megamed.checkpoint.card import differing_key

    (first, was), *others = ((path, read_card(path)["model"]) for path in checkpoints.values())
    for path, now in others:
        if differing := differing_key(was, now):
            key, one, other = differing
            raise UserError(
                f"--merge: {first} and {path} are of different models (model.{key} is {one} and {other}); merge models "
                "that were trained from one ancestor"
            )


def run(args: argparse.Namespace) -> None:
    """Make the checkpoint, and say how to train it."""
    from megamed.checkpoint import model_of, rewrite, specialist_settings, specialists
    from megamed.checkpoint.hf.sidecar import carry_sidecar
    from megamed.checkpoint.weights import Weights
    from megamed.parallel.init import drawn
    from megamed.train.run import versions
    from megamed.utils import log

    log.setup(0)
    rewrite.check_target(args.to, args.overwrite)
    checkpoints = sources(args)
    check_alike(checkpoints)
    first = next(iter(checkpoints.values()))
    dense = model_of(first)
    config = specialists.with_experts(dense, settings(args, dense), str(first))
    moe = config.language.moe
    if args.dense:
        specialists.need_exact_weights(moe)
    specialist_settings.check(config)
    std, variation = config.language.init_std, specialists.Variation(args.noise, args.reinit, args.seed)

    def draw(name: str, shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
        return drawn(name, shape, args.seed, std)

    weights = {name: Weights(path) for name, path in checkpoints.items()}
    one = next(iter(weights.values()))
    make: rewrite.Make = (
        specialists.Upcycle(one, config, variation, draw)
        if args.dense
        else specialists.Merge(weights, config, variation, draw)
    )
    with rewrite.one_process() as mesh:
        pieces = rewrite.outline(config, mesh, one.dtype("language.embedding.word_embeddings.weight"))
        beside = {specialist_settings.MOE_FILE: specialist_settings.moe_yaml(moe)}
        card, carry = rewrite.make_card(config, versions()), partial(carry_sidecar, first)
        size = rewrite.write_weights(args.to, pieces, make, card, beside, prepare=carry)
    print(f"{args.to}: {size / 2**20:,.1f} MiB, {moe.total_experts} experts a layer ({moe.resolved})")
    if args.dense and (args.noise or args.reinit):
        print("Its experts were varied (--noise, --reinit): it no longer computes exactly what the dense model does.")
    elif args.dense:
        print("Before its first step it computes what the dense model does.")
    warmup = [f"optim.router_warmup_steps={ROUTER_WARMUP_STEPS}"] if args.merge else []
    print("Train it with the settings of your model and data, and:\n")
    print(specialist_settings.instructions(config, args.to, CONF, warmup))


def main() -> int:
    args = parse()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: shapes are made where no GPU is
    return exit_code(partial(run, args), f"nothing is left of {args.to}")


if __name__ == "__main__":
    sys.exit(main())
