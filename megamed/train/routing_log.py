"""`routing.jsonl`: which experts the tokens of each specialty were sent to, over windows of steps.

Shapes: L mixture-of-experts layers, R rows (specialties, tokens without any, all tokens), E experts.
"""

from pathlib import Path

import numpy as np
import torch.distributed as dist

from megamed.models.moe.report import row_names
from megamed.train.config import JobConfig
from megamed.train.loop import StepEvent
from megamed.train.step_log import StepLog


class RoutingLog:
    """Writes a line for each window of steps, on rank 0; nothing for a dense model.

    A window ends at a multiple of `model.language.moe.log_every`, at a checkpoint and at the last step. The first
    window of a resumed run then begins where the checkpoint was taken and the last line that is kept ends: every step
    is in exactly one line, however often the run was killed. Lines say how many steps they are of.

    Each line: `step`, the last of the window; `steps`, how many; `layers`, numbers of the layers with experts, from 1;
    `pools`, their sizes in order; `rows`, what the rows are; `expert_parallel`, ranks that share a layer's experts;
    `entropy` [L], of the router's distribution over experts, nats, mean over the window's tokens; `picks` [L][R][E],
    top-k choices in the numbering of `Pools`, summed over the window.

    Args:
        path: the file.
        config: the job's settings.
    """

    def __init__(self, path: Path, config: JobConfig):
        language = config.model.language
        self.log, self.pools = StepLog(path), language.moe.resolved
        self.layers = list(range(language.moe.first_dense_layers + 1, language.num_layers + 1))
        self.expert_parallel = config.parallel.expert
        self.periods = [p for p in (language.moe.log_every, config.checkpoint.every_steps) if p]
        self.last_step = config.train.steps
        self._start_window()

    def _start_window(self) -> None:
        self.steps = 0
        self.picks_LRE = np.zeros((len(self.layers), len(row_names(self.pools)), self.pools.num_experts), np.int64)
        self.entropy_L = np.zeros(len(self.layers))  # summed over tokens

    def start(self, step: int) -> None:
        if self.pools.num_experts:
            self.log.start(step)
        elif dist.get_rank() == 0 and not step:
            self.log.path.unlink(missing_ok=True)  # of an earlier run in this folder, which had experts

    def after_step(self, event: StepEvent) -> None:
        routing = event.report.routing
        if routing is None or self.log.file is None:
            return
        self.steps += 1
        self.picks_LRE += routing.picks
        self.entropy_L += routing.entropy * routing.picks[:, -1].sum(-1)  # top_k times the tokens
        if event.step == self.last_step or any(event.step % period == 0 for period in self.periods):
            self._end_window(event.step)

    def _end_window(self, step: int) -> None:
        entropy_L = self.entropy_L / np.maximum(self.picks_LRE[:, -1].sum(-1), 1)
        self.log.write(
            {
                "step": step,
                "steps": self.steps,
                "layers": self.layers,
                "pools": dict(self.pools.sizes),
                "rows": row_names(self.pools),
                "expert_parallel": self.expert_parallel,
                "entropy": entropy_L.round(6).tolist(),
                "picks": self.picks_LRE.tolist(),
            }
        )
        self._start_window()

    def end(self) -> None:
        self.log.close()
