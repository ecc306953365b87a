"""What happens beside the training: progress, metrics, Weights & Biases, checkpoints."""

import logging
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megamed.checkpoint import CheckpointManager
from megamed.data import MicrobatchSource
from megamed.models.moe.report import routing_metrics
from megamed.runtime import current_device, peak_memory_bytes
from megamed.train.config import JobConfig, WandbConfig
from megamed.train.loop import StepEvent
from megamed.train.step_log import StepLog
from megamed.utils import UserError, stop
from megamed.utils.optional import require

log = logging.getLogger(__name__)

Measure = Callable[[StepEvent], dict[str, Any]]


def measurements(event: StepEvent, config: JobConfig, peak_flops: float) -> dict[str, Any]:
    """What a step reports to metrics and trackers.

    Args:
        event: the step.
        config: the job's settings.
        peak_flops: matrix-product peak of one rank, FLOP/s.
    """
    report, seconds = event.report, event.seconds
    flops_per_s = event.flops / seconds / dist.get_world_size()
    values: dict[str, Any] = {"step": event.step, "loss": report.loss}
    values |= {f"loss_{kind}": value for kind, value in report.loss_by_kind.items()}
    values |= report.moe_losses
    if report.routing is not None:
        values |= routing_metrics(report.routing, config.model.language.moe.resolved, config.parallel.expert)
    values |= {
        "lr": event.lr,
        "grad_norm": report.grad_norm,
        "tokens": report.num_tokens,
        "labels": report.num_labels,
        "frames": report.num_frames,
        "seconds": round(seconds, 6),
        "data_seconds": round(event.data_seconds, 6),
        "tokens_per_s": round(report.num_tokens / seconds, 3),
        "frames_per_s": round(report.num_frames / seconds, 3),
        "tflops_per_rank": round(flops_per_s / 1e12, 6),
        "mfu": round(flops_per_s / peak_flops, 6),
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 4),
    }
    if event.is_skipped:
        values["skipped"] = True
    # JSON has no word for what is not finite.
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}


class Progress:
    """A progress bar on rank 0: loss, tokens/s, and the time that is left. A log file gets it every 10 s alone."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self.bar: Any = None

    def start(self, step: int) -> None:
        self.close()  # of a run that went back
        stream = sys.stderr  # None where whoever started the program had closed it
        tqdm.set_lock(threading.RLock())  # its own is shared between processes, and starts one that watches it
        self.bar = tqdm(
            total=self.total_steps,
            initial=step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if stream is not None and stream.isatty() else 10.0,
            disable=stream is None or dist.get_rank() != 0,
        )

    def after_step(self, event: StepEvent) -> None:
        rate = event.report.num_tokens / event.seconds
        self.bar.set_postfix_str(f"loss {event.report.loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def end(self) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, whatever happened, so that what is printed next has one of its own."""
        if self.bar is not None:
            self.bar.close()


class Metrics:
    """`metrics.jsonl`: one JSON object a step, written by rank 0.

    Args:
        path: the file.
        measure: what a step reports; `measurements` with its other arguments.
    """

    def __init__(self, path: Path, measure: Measure):
        self.log, self.measure = StepLog(path), measure

    def start(self, step: int) -> None:
        self.log.start(step)

    def after_step(self, event: StepEvent) -> None:
        if self.log.file:
            self.log.write(self.measure(event))

    def end(self) -> None:
        self.log.close()


class Wandb:
    """Weights & Biases on rank 0: numbers and sizes only, no path, host or user name."""

    def __init__(self, config: WandbConfig, folder: Path, name: str, settings: dict[str, Any], measure: Measure):
        self.config, self.folder, self.name = config, folder, name
        self.settings, self.measure = settings, measure
        self.run: Any = None

    def start(self, step: int) -> None:
        if dist.get_rank() or self.config.mode == "disabled" or self.run is not None:
            return
        wandb = require("wandb", f"wandb.mode={self.config.mode}", "pip install wandb")
        # Its reports of its own errors go over the network, offline or not, and have tracebacks with paths.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        private = wandb.Settings(
            silent=True,
            console="off",
            host="",
            symlink=False,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        try:
            self.run = wandb.init(
                mode=self.config.mode,
                project=self.config.project,
                name=self.name,
                dir=str(self.folder),
                config=self.settings,
                settings=private,
            )
        except (wandb.Error, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(
                f"wandb.mode={self.config.mode}: Weights & Biases does not start ({reason}); mend that, or set "
                "wandb.mode=disabled (metrics.jsonl has the same numbers)"
            ) from error
        # Its debug logs begin with the run's whole path, and with it the user's name.
        shutil.rmtree(self.run.settings.log_dir, ignore_errors=True)

    def after_step(self, event: StepEvent) -> None:
        if self.run:
            values = self.measure(event)
            self.run.log({k: v for k, v in values.items() if k != "step"}, step=event.step)

    def end(self) -> None:
        if self.run:
            self.run.finish()


class Checkpoints:
    """Saves every `every_steps` steps, after the last one, and when the job is asked to stop, which ends it then.

    A save that fails before the last step ends nothing: it is said, and the next one is tried. The earlier checkpoints
    are there still.
    """

    def __init__(self, manager: CheckpointManager, source: MicrobatchSource, every_steps: int, total_steps: int):
        self.manager, self.source, self.every_steps, self.total_steps = manager, source, every_steps, total_steps

    def start(self, step: int) -> None:
        pass

    def after_step(self, event: StepEvent) -> None:
        is_last, is_asked = event.step == self.total_steps, _any_rank(stop.is_asked())
        due = self.every_steps and event.step % self.every_steps == 0
        try:
            self.manager.poll()
            if due or is_last or is_asked:
                self.manager.save(event.step, event.position, self.source.state(event.position), event.skipped)
            if is_asked:
                self.manager.wait()
        except UserError as error:  # of every rank, or of none
            if is_last or is_asked:
                raise
            if dist.get_rank() == 0:
                log.warning("%s; training goes on", str(error).replace(", then run again", ""))
        if is_asked and not is_last:
            if dist.get_rank() == 0:
                log.info("stopping after step %d, as asked; run the same command again to go on", event.step)
                stop.tell_starter(event.step)
            raise Stopped(0)

    def end(self) -> None:
        self.manager.export()


class Stopped(SystemExit):
    """The job was asked to stop, has saved, and ends without an error."""


def _any_rank(value: bool) -> bool:
    """Whether it holds on some rank. Collective: a signal does not reach all ranks in the same step."""
    total = torch.tensor(float(value), device=current_device())
    dist.all_reduce(total)
    return bool(total.item())
