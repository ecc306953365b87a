"""Pretrain a vision-language model.

    torchrun --nproc-per-node 2 launch/pretrain.py +exp=fmri [key=value ...]
    torchrun --nproc-per-node 2 launch/pretrain.py +exp=ct data.store=STORE [key=value ...]

`--cfg` prints the composed configuration and stops. Without torchrun it is a job of one process.
"""

import argparse
import signal
from functools import partial
from pathlib import Path

from megamed.utils import stop

CONF = Path(__file__).resolve().parent.parent / "conf"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/pretrain.py",
        description="Pretrain a vision-language model; see conf/ for groups and keys.",
        epilog="examples: +exp=fmri   +exp=fmri data.path=RUN.nii train.steps=500   +exp=fmri parallel.tensor=2",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; +exp=NAME: an experiment")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run's config.yaml, in the place of conf/")
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    args, unknown = parser.parse_known_args()
    args.overrides += unknown  # where a misspelt option gets a better message
    return args


def main(args: argparse.Namespace) -> None:
    from megamed import checkpoint, data, eval, preflight, runtime, train
    from megamed.config import compose, load, to_yaml
    from megamed.train import run
    from megamed.utils import log

    log.setup(runtime.global_rank())
    values = args.config or CONF / "pretrain.yaml"
    config = load(train.JobConfig, compose(values.parent, values.stem, args.overrides))
    run.adopt_hf(config)
    if args.cfg:
        print(to_yaml(config), end="")
        return
    run.check_values(config)
    config.validate(runtime.world_size())
    tokenizer = data.load_tokenizer(config.data.tokenizer)
    run.check_vocabulary(config, tokenizer)
    preflight.check_before_start(config, args.config, args.overrides)
    size, num_tokens = config.model.vision.image_size, config.model.tokens_per_frame
    specialties = config.model.language.moe.specialties
    source = data.build_source(config.data, tokenizer, size, num_tokens, config.document_multiple, specialties)
    run.say_start()

    runtime.start()
    mesh = runtime.build_mesh(config.parallel, config.ulysses, config.document_multiple)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    folder, resume_from = run.choose_run(config.run)
    job = train.build_job(config, mesh)
    facts = run.describe(config, mesh)
    saved = (config.checkpoint, job.model, job.optimizer, job.scheduler)
    manager = checkpoint.CheckpointManager(folder / "checkpoints", *saved, mesh, facts)
    card = manager.load_newest() if resume_from else manager.start_from(config.init.checkpoint, config.init.hf)
    source.restore(card["position"], card.get("data", {}))
    start_step = card["step"]
    ask = partial(
        eval.ask_held_out, job.model, job.phase, mesh, source, tokenizer,
        config.data.seq_length, config.model.language.vocab_size, config.eval.max_new_tokens, config.eval.blank_control,
    )
    evaluation = eval.HeldOutEvaluation(ask, folder / "held_out.jsonl", config.eval.every_steps)
    if start_step < config.train.steps:
        run.write_settings(config, tokenizer, folder, start_step, facts["layout"], source.state(card["position"]))
        measure = partial(train.measurements, config=config, peak_flops=train.matmul_peak(job.dtype))
        callbacks: list[train.Callback] = [
            train.Metrics(folder / "metrics.jsonl", measure),
            train.RoutingLog(folder / "routing.jsonl", config),
            train.Stragglers(folder / "stragglers.jsonl", config, job.phase),
            train.Wandb(config.wandb, folder, config.run.name, facts, measure),
            train.Checkpoints(manager, source, config.checkpoint.every_steps, config.train.steps),
        ]
        callbacks += [evaluation] if config.eval.held_out else []
        train.fit_watched(job, source, callbacks, manager, card, folder)
    else:
        run.say_complete(start_step, folder)
        if config.eval.held_out:
            evaluation.start(start_step)
            evaluation.end()
    run.say_where(folder)


if __name__ == "__main__":
    stop.listen()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback on Ctrl-C during the imports
    args = parse()  # before the imports, which take seconds
    from megamed.runtime.process import run as run_process

    run_process(partial(main, args))
