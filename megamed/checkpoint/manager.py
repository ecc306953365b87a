"""Saves and loads checkpoints: written aside and renamed, so that a kill at any moment leaves the last good one.

A checkpoint is a folder `step_00000100`. While it is written it has another name; the rename is what makes
it exist. `megamed.json` in it says what it is, in text.
"""

import contextlib
import errno
import inspect
import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megamed.checkpoint.card import (
    CARD,
    MEND_DAMAGED,
    differing_key,
    find_checkpoint,
    list_checkpoints,
    read_card,
    step_of,
)
from megamed.checkpoint.config import CheckpointConfig
from megamed.checkpoint.hf.convert import export_folder
from megamed.checkpoint.hf.sidecar import SIDECAR, carry_sidecar
from megamed.checkpoint.hf.start import fill_from_folder
from megamed.checkpoint.state import load_optimizer, model_state, optimizer_state, random_state
from megamed.checkpoint.sums import SUMS, find_damage, write_sums
from megamed.checkpoint.weights import Weights, fill_state
from megamed.checkpoint.writer import BackgroundWriter, reason_of, write_file
from megamed.runtime import Mesh, set_rng_state
from megamed.utils import UserError
from megamed.utils.files import sync

log = logging.getLogger(__name__)

_UNFINISHED, _DISCARDED, _DAMAGED = ".unfinished", ".discarded", ".damaged"
# Beside as much as the last checkpoint took.
_SPARE_BYTES = 2**20
EXPORTS = "hf_export"

# megatron-core 0.19 wants to know whose machinery writes, and takes an optional package's unless told otherwise.
_ASYNC_OPTION: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)

# What routers keep beside their weight, and the setting of model.language.moe that makes them.
_NEEDED_BY = {"prior": ("routing", "soft"), "expert_bias": ("balance", "bias")}

# What a full disk makes Megatron and torch raise: torch's own writer turns the system's error into a RuntimeError.
_WRITE_ERRORS = (CheckpointException, CheckpointingException, OSError, RuntimeError)


class Placed(Protocol):
    """The parts of a model on this rank; `megamed.parallel.PlacedModel` is one."""

    @property
    def language(self) -> list[DistributedDataParallel]: ...
    @property
    def vision(self) -> DistributedDataParallel: ...


class CheckpointManager:
    """Saves and loads the whole training state of a run.

    Args:
        folder: where the checkpoints go.
        config: the settings.
        model, optimizer, scheduler: what is saved.
        mesh: the layout.
        describe: facts for the card (model, layout, optimizer, versions), JSON-serialisable.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        model: Placed,
        optimizer: ChainedOptimizer,
        scheduler: OptimizerParamScheduler,
        mesh: Mesh,
        describe: dict[str, Any],
    ):
        self.folder, self.config, self.describe = folder, config, describe
        self.model, self.optimizer, self.scheduler, self.mesh = model, optimizer, scheduler, mesh
        self._writer = BackgroundWriter()
        self._target = folder
        self._is_validated = False
        self._strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)

    def save(self, step: int, position: int, data: dict[str, Any] | None = None, skipped: int = 0) -> Path:
        """Save after `step` steps. Collective. With `asynchronous`, returns while it is being written.

        Args:
            step: optimizer steps taken.
            position: microbatches of the data consumed, over all replicas.
            data: what the data source keeps of that position, for the card; JSON-serialisable.
            skipped: of the steps, those that the optimizer did not take.

        Returns:
            The folder that the checkpoint will have.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        self.wait()
        target = self.folder / f"step_{step:08d}"
        aside = target.with_name(target.name + _UNFINISHED)
        model = model_state(self.model.language, self.model.vision, self.mesh)
        state = {
            "model": model,
            "optimizer": optimizer_state(self.optimizer, model, is_loading=False),
            "scheduler": self.scheduler.state_dict(),
            "random": random_state(),
        }
        self._on_first_rank(lambda: self._prepare(aside), target)
        card = {
            **self.describe, "step": step, "position": position, "data": data or {},
            "world_size": dist.get_world_size(), "has_checksums": True, "skipped": skipped,
        }  # fmt: skip
        try:
            request = dist_checkpointing.save(
                state,
                str(aside),
                self._strategy,
                async_sharded_save=True,
                validate_access_integrity=not self._is_validated,  # what is on which rank does not change
                **_ASYNC_OPTION,
            )
            self._is_validated = True
        except _WRITE_ERRORS as error:
            raise self._failure(target, error) from error
        request.finalize_fns.append(lambda: self._on_first_rank(lambda: self._finish(aside, target, card), target))
        self._target = target
        self._writer.start(request)
        if not self.config.asynchronous:
            self.wait()
        return target

    def poll(self) -> None:
        """Finish a save that has been written by now. Collective; costs one small all-reduce while one is open."""
        self._finish_writing(wait=False)

    def wait(self) -> None:
        """Wait for the save that is being written. Collective."""
        self._finish_writing(wait=True)

    def export(self) -> None:
        """Make a Hugging Face folder of the last checkpoint, if `export_hf` says so and there is none yet. Collective.

        Raises:
            UserError: the disk is full or not writable.
        """
        self.wait()
        kept = list_checkpoints(self.folder)
        if self.config.export_hf and kept and not self._export_of(kept[-1]).exists():
            self._on_first_rank(lambda: _export(kept[-1], self._export_of(kept[-1])), kept[-1])

    def _export_of(self, checkpoint: Path) -> Path:
        return self.folder.parent / EXPORTS / checkpoint.name

    def load_newest(self) -> dict[str, Any]:
        """Load the newest checkpoint of this run that is whole. Collective.

        One that is damaged gets another name, for someone to look at, and the one before it is taken.

        Returns:
            Its card.

        Raises:
            UserError: none is whole, or the whole one is of another model.
        """
        while True:
            listed = [list_checkpoints(self.folder)]
            dist.broadcast_object_list(listed)  # file systems do not show every rank the same at one moment
            kept = listed[0]
            if not kept:
                raise UserError(
                    f"{self.folder}: no checkpoint is whole; those that are damaged are named *{_DAMAGED}. Restore one "
                    "from a copy, or begin anew with run.resume=no",
                    everywhere=True,
                )
            problem = self.find_damage(kept[-1])
            if problem is None:
                return self.load(kept[-1])
            self._on_first_rank(partial(_set_aside, kept[-1], problem), kept[-1])

    def find_damage(self, checkpoint: Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None for nothing. Collective.

        Nothing is looked at where `verify` is false, or in a checkpoint from before there were checksums.
        """
        if not self.config.verify or not ((checkpoint / SUMS).exists() or _should_have_sums(checkpoint)):
            return None
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, find_damage(checkpoint, dist.get_rank(), dist.get_world_size()))
        return next(filter(None, problems), None)

    def load(self, checkpoint: Path) -> dict[str, Any]:
        """Load a checkpoint in place: weights, optimizer, scheduler and, at the same layout, random states.

        Of the scheduler that is the number of steps taken alone. Peak, warm-up and decay are what they are set to
        now: a run that is given more steps goes on where a run of that length would be on its schedule, which may
        be above the learning rate that it had come down to. `optim.decay_steps` keeps the earlier length.

        Returns:
            Its card.

        Raises:
            UserError: it is of another model, or damaged.
        """
        card = read_card(checkpoint)
        if card.get("weights_only"):
            raise UserError(
                f"{checkpoint}: has weights alone; start a new run from them with run.name=NAME "
                f"init.checkpoint={checkpoint}", everywhere=True,
            )  # fmt: skip
        self._check_optimizer(checkpoint, card)
        self._check_model(checkpoint, card, "set the model back or start a new run with run.name=NAME")
        # Read for this alone, which a dense model has no need of.
        has_experts = self.model.language[0].module.moe.total_experts
        if has_experts and (lacking := self._router_state(Weights(checkpoint))[0]):
            raise UserError(
                f"{checkpoint}: its routers have no {lacking[0]}; set model.language.moe.{_NEEDED_BY[lacking[0]][0]} "
                f"back, or start a new run from its weights with run.name=NAME init.checkpoint={checkpoint}",
                everywhere=True,
            )
        model = model_state(self.model.language, self.model.vision, self.mesh)
        state: dict[str, Any] = {
            "model": model,
            "optimizer": optimizer_state(self.optimizer, model, is_loading=True),
        }
        same_layout = card["layout"] == self.describe["layout"] and card["world_size"] == dist.get_world_size()
        if same_layout:
            state["random"] = random_state()
        try:
            with _quiet_torch():
                loaded = dist_checkpointing.load(state, str(checkpoint))
        except (Exception, CheckpointException) as error:  # damaged files raise whatever their bytes lead to
            raise UserError(f"{checkpoint}: cannot be loaded ({reason_of(error)}); {MEND_DAMAGED}") from error
        for index, chunk in enumerate(self.model.language):
            chunk.module.load_state_dict(_without_prefix(loaded["model"][f"language{index}"], "language."))
        self.model.vision.module.load_state_dict(_without_prefix(loaded["model"]["vision"], "vision."))
        load_optimizer(self.optimizer, loaded["optimizer"], card["step"] - card.get("skipped", 0))
        self._load_scheduler(loaded["scheduler"])
        if same_layout:
            set_rng_state(loaded["random"])
        return card

    def start_from(self, path: str | None, hf: str | None = None) -> dict[str, Any]:
        """Start a new run: from the weights in a checkpoint of any layout, of a Hugging Face folder, or as they are.

        Nothing else is taken from it: step, optimizer, schedule and data begin anew. A prior or a bias of routers
        that it lacks keeps its initial values; one that this model does not have is left behind.

        Args:
            path: the checkpoint, or a run whose newest one is meant; the same on every rank. Collective with one.
            hf: the Hugging Face folder.

        Returns:
            In the place of a card, where the run begins.

        Raises:
            UserError: there is no checkpoint, it is of another model, or damaged.
        """
        sidecar = self.folder.parent / SIDECAR
        if hf is not None:
            fill_from_folder(Path(hf), model_state(self.model.language, self.model.vision, self.mesh), sidecar)
            self.optimizer.reload_model_params()
        elif path is not None:
            checkpoint = _found_by_first_rank(Path(path))
            card = read_card(checkpoint)
            self._check_model(checkpoint, card, "set the model to that one, or take another checkpoint")
            if problem := self.find_damage(checkpoint):
                raise UserError(f"{checkpoint}: {problem}; take another checkpoint, or a copy of it", everywhere=True)
            weights = Weights(checkpoint)
            lacking, left = self._router_state(weights)
            state = model_state(self.model.language, self.model.vision, self.mesh)
            fill_state(weights, state, lambda tensor: tensor.key.rpartition(".")[2] not in lacking)
            self.optimizer.reload_model_params()  # of which the optimizer keeps copies
            if dist.get_rank() == 0:
                carry_sidecar(checkpoint, sidecar.parent)
                log.info("starting from the weights of %s, of step %d", checkpoint, card["step"])
                for name in lacking:
                    log.info("its routers have no %s: it begins at its initial values", name)
                for name in left:
                    key, value = _NEEDED_BY[name]
                    log.info("its routers' %s is left behind, as model.language.moe.%s is not %s", name, key, value)
        return {"step": 0, "position": 0}

    def _router_state(self, weights: Weights) -> tuple[list[str], list[str]]:
        """What routers of this model have and those in a checkpoint lack; and what those alone have."""
        moe = self.model.language[0].module.moe
        if not moe.total_experts:
            return [], []
        there = {name.rpartition(".")[2] for name in weights if ".router." in name}
        here = {name for name, (key, value) in _NEEDED_BY.items() if getattr(moe, key) == value}
        return sorted(here - there), sorted((there & set(_NEEDED_BY)) - here)

    def _check_model(self, checkpoint: Path, card: dict[str, Any], mend: str) -> None:
        if differing := differing_key(card["model"], self.describe["model"]):
            key, was, now = differing
            raise UserError(
                f"{checkpoint}: is of another model (model.{key} was {was}, is now {now}); {mend}", everywhere=True
            )

    def _check_optimizer(self, checkpoint: Path, card: dict[str, Any]) -> None:
        """The distributed optimizer's state fits any type of weights, the other kind's its own alone."""
        was, now = card.get("optimizer", {}), self.describe.get("optimizer", {})
        keys = ["optim.distributed"] if now.get("optim.distributed") else ["optim.distributed", "train.dtype"]
        for key in keys:
            if was.get(key) != now.get(key):
                value = str(was.get(key)).lower()
                raise UserError(
                    f"{checkpoint}: its optimizer state is of {key}={value}; set {key}={value}, or start a new run "
                    "with run.name=NAME",
                    everywhere=True,
                )

    def _load_scheduler(self, state: dict[str, Any]) -> None:
        self.scheduler.num_steps = 0  # Megatron adds the loaded steps to those that it has taken
        self.scheduler.load_state_dict(state)
        was, now = state["lr_decay_steps"], self.scheduler.lr_decay_steps
        if was != now and dist.get_rank() == 0:
            log.info(
                "the learning rate decays over %d steps, no longer over %d, and is %.3g now; optim.decay_steps=%d "
                "keeps the earlier schedule", now, was, self.optimizer.param_groups[0]["lr"], was,
            )

    def _prepare(self, aside: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for suffix in (_UNFINISHED, _DISCARDED):
            for leftover in self.folder.glob(f"step_*{suffix}"):
                shutil.rmtree(leftover)
        # All ranks begin to write, or none does: what fails later, on one of them, is harder to get out of.
        kept = list_checkpoints(self.folder)
        needed = sum(path.stat().st_size for path in kept[-1].rglob("*") if path.is_file()) if kept else 0
        if shutil.disk_usage(self.folder).free < needed + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        aside.mkdir()

    def _finish(self, aside: Path, target: Path, card: dict[str, Any]) -> None:
        _forget_path(aside / ".metadata")
        write_file(aside / CARD, json.dumps(card, indent=1).encode())
        write_sums(aside, self._writer.sums)
        if target.exists():  # the same step, saved again by a run that went back
            _discard(target)
        os.rename(aside, target)
        sync(self.folder)
        if self.config.export_hf_each:
            export_folder(target, self._export_of(target))
        if self.config.keep_last:
            for old in list_checkpoints(self.folder)[: -self.config.keep_last]:
                if not self.config.keep_every or step_of(old) % self.config.keep_every:
                    _discard(old)

    def _on_first_rank(self, action: Callable[[], None], target: Path) -> None:
        """Run on rank 0 and let every rank fail if it fails."""
        failure: list[UserError | str | None] = [None]
        if dist.get_rank() == 0:
            try:
                action()
            except OSError as error:
                failure = [reason_of(error)]
            except UserError as error:
                failure = [error]
        dist.broadcast_object_list(failure)
        if isinstance(failure[0], UserError):
            raise failure[0]
        if failure[0]:
            raise self._failure(target, OSError(failure[0]))

    def _finish_writing(self, wait: bool) -> None:
        try:
            self._writer.finish(wait)
        except _WRITE_ERRORS as error:
            raise self._failure(self._target, error) from error

    def _failure(self, target: Path, error: BaseException) -> UserError:
        """What to tell the user of a save that failed; what it wrote is removed, to give back its space."""
        place = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free_mib = shutil.disk_usage(place).free >> 20  # torch does not always say that a disk is full
        if dist.get_rank() == 0:
            shutil.rmtree(target.with_name(target.name + _UNFINISHED), ignore_errors=True)
        kept = list_checkpoints(self.folder)
        intact = f"earlier checkpoints are intact, the last is {kept[-1].name}" if kept else "there is none before it"
        return UserError(
            f"{target}: cannot be written ({reason_of(error)}; {free_mib} MiB free there); free space or set run.dir "
            f"to another disk, then run again; {intact}"
        )


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch from warning of types that it uses itself, and from logging tracebacks of what it then raises."""

    def has_no_traceback(record: logging.LogRecord) -> bool:
        return not record.exc_info

    root = logging.getLogger()  # which is where it logs
    root.addFilter(has_no_traceback)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        root.removeFilter(has_no_traceback)


def _found_by_first_rank(path: Path) -> Path:
    """The checkpoint that `init.checkpoint` means, the same on every rank: a run that still goes on makes new ones."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find_checkpoint(path, "init.checkpoint")]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def _without_prefix(weights: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _export(checkpoint: Path, target: Path) -> None:
    log.info("making a Hugging Face folder of %s", checkpoint.name)
    export_folder(checkpoint, target)


def _should_have_sums(checkpoint: Path) -> bool:
    """Whether a list of checksums is missing, and was not left out by a megamed of before there were any."""
    try:
        return bool(read_card(checkpoint).get("has_checksums", False))
    except UserError:
        return True


def _set_aside(checkpoint: Path, problem: str) -> None:
    other = checkpoint.with_name(checkpoint.name + _DAMAGED)
    if other.exists():
        shutil.rmtree(other)
    log.warning("%s: %s; it is kept as %s, and the checkpoint before it is taken", checkpoint, problem, other.name)
    os.rename(checkpoint, other)
    sync(other.parent)


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint. Under its name it is there whole or not at all, should this be interrupted."""
    aside = checkpoint.with_name(checkpoint.name + _DISCARDED)
    os.rename(checkpoint, aside)
    shutil.rmtree(aside)


def _forget_path(metadata: Path) -> None:
    """Take out of torch's metadata where the checkpoint was written, which may hold a user's name."""
    content = pickle.loads(metadata.read_bytes())  # written a moment ago, by this run
    content.storage_meta = None
    write_file(metadata, pickle.dumps(content))
