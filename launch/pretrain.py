"""Pretrain a vision-language model.

    torchrun --nproc-per-node 2 launch/pretrain.py +exp=fmri [key=value ...]

`--cfg` prints the composed configuration and stops. Without torchrun it is a job of one process.
"""

import argparse
from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/pretrain.py",
        description="Pretrain a vision-language model; see conf/ for groups and keys.",
        epilog="examples: +exp=fmri   +exp=fmri data.path=RUN.nii train.steps=500   +exp=fmri parallel.tensor=2",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides; +exp=NAME takes an experiment")
    parser.add_argument("--cfg", action="store_true", help="print the composed configuration and stop")
    return parser.parse_args()


def main() -> None:
    args = parse()
    from megamed import checkpoint, data, eval, runtime, train
    from megamed.config import compose, load, to_yaml
    from megamed.train import run
    from megamed.utils import log

    log.setup(runtime.global_rank())
    config = load(train.JobConfig, compose(CONF, "pretrain", args.overrides))
    if args.cfg:
        print(to_yaml(config), end="")
        return
    config.validate(runtime.world_size())
    tokenizer = data.load_tokenizer(config.data.tokenizer)
    run.check_vocabulary(config, tokenizer.vocab_size)
    fmri = data.read_run(config.data.path)

    runtime.start()
    mesh = runtime.build_mesh(config.parallel)
    runtime.seed_everything(config.train.seed, mesh.data_rank)
    folder, resume_from = run.choose_run(config.run)
    job = train.build_job(config, mesh)
    source = data.FmriSource(
        fmri, config.data, tokenizer, config.model.vision.image_size, job.model.vision.module.tokens_per_frame
    )
    manager = checkpoint.CheckpointManager(
        folder / "checkpoints",
        config.checkpoint,
        job.model,
        job.optimizer,
        job.scheduler,
        mesh,
        run.describe(config, mesh),
    )
    start_step = manager.load(resume_from)["step"] if resume_from else 0
    run.write_config(config, folder)
    if runtime.global_rank() == 0:
        tokenizer.save(folder / "tokenizer")
    peak = train.matmul_peak(job.dtype)
    callbacks = [
        train.Progress(config.train.steps),
        train.Metrics(folder / "metrics.jsonl", peak),
        train.Wandb(config.wandb, folder, config.run.name, run.describe(config, mesh), peak),
        train.Checkpoints(manager, config.checkpoint.every_steps, config.train.steps),
    ]
    train.fit(job, source, callbacks, start_step)
    if config.eval.held_out:
        answers = eval.ask_held_out(
            job.model,
            job.phase,
            mesh,
            source.held_out(),
            source.load_frames,
            tokenizer,
            config.data.seq_length,
            config.model.language.vocab_size,
            config.eval.max_new_tokens,
            config.eval.blank_control,
        )
        if runtime.global_rank() == 0:
            print(eval.table(answers))
    if runtime.global_rank() == 0:
        run.say_where(folder)


if __name__ == "__main__":
    from megamed.runtime.process import run as run_process

    run_process(main)
