"""Greedy decoding of many prompts at once, at the layout that the model trains at.

Prompts are packed into rows, each with room for its answer, and every step runs whole rows: no cache
of keys and values. That fits answers of a few words at the end of a training run.

Shapes: S tokens of a row, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megamed.data import Document, Frame, Microbatch, pack
from megamed.parallel import LanguageInput, PlacedModel, VisionPhase, run_schedule
from megamed.runtime import Mesh


class Prompt(Protocol):
    """What is decoded from; `megamed.data.HeldOutItem` is one."""

    @property
    def prompt_tokens(self) -> list[int]: ...
    @property
    def visual_positions(self) -> list[int]: ...
    @property
    def frames(self) -> list[Frame]: ...
    @property
    def specialties(self) -> int: ...


@dataclass(frozen=True)
class _Slot:
    """Where a prompt lies: its row, its start there, its number of tokens."""

    prompt: int
    row: int
    start: int
    length: int


@torch.no_grad()
def greedy(
    model: PlacedModel,
    phase: VisionPhase,
    mesh: Mesh,
    prompts: Sequence[Prompt],
    load: Callable[[Sequence[Frame]], Tensor],
    seq_length: int,
    vocab_size: int,
    max_new_tokens: int,
    end_id: int,
    pad_id: int,
) -> list[list[int]]:
    """Decode all prompts. Collective: every rank calls it with the same arguments.

    Args:
        model, phase, mesh: the placed model, its vision phase and the layout.
        prompts: what to decode; shared out over the replicas.
        load: frames of some references, [N, C, H, W].
        seq_length: S, the length of the rows that prompts are packed into.
        vocab_size: V without padding.
        max_new_tokens: longest answer.
        end_id: ends an answer; not part of it.
        pad_id: fills rows.

    Returns:
        The new tokens of each prompt, the same on every rank.
    """
    rows, slots = _lay_out(prompts, seq_length, max_new_tokens, pad_id, mesh.document_multiple)
    # Every replica runs as many rows as the busiest one, so that experts spread over replicas stay in step.
    # The interleaved schedule takes them in groups of the pipeline's size.
    group = mesh.config.pipeline if mesh.config.virtual_pipeline > 1 else 1
    per_replica = -(-len(rows) // (mesh.data_size * group)) * group
    mine = [(mesh.data_rank + i * mesh.data_size) % len(rows) for i in range(per_replica)]
    for part in model.parts:
        part.eval()
    visual = phase.forward([rows[i] for i in mine], load, keep_graph=False)
    answers: dict[int, list[int]] = {s.prompt: [] for s in slots if s.row in mine}
    for count in range(max_new_tokens):
        inputs = phase.language_inputs([rows[i] for i in mine], visual)
        best = _best_tokens(model, mesh, inputs, seq_length, vocab_size)
        for slot in slots:
            if slot.row in mine:
                place = slot.start + slot.length + count
                token = int(best[mine.index(slot.row)][place - 1])
                rows[slot.row].tokens_S[place] = token
                answers[slot.prompt].append(token)
        if _all_ended(answers, end_id, best.device):
            break
    for part in model.parts:
        part.train()
    return _gather(answers, len(prompts), end_id)


def _lay_out(
    prompts: Sequence[Prompt], seq_length: int, max_new_tokens: int, pad_id: int, document_multiple: int
) -> tuple[list[Microbatch], list[_Slot]]:
    rows: list[list[Document]] = [[]]
    slots, used = [], 0
    for index, prompt in enumerate(prompts):
        tokens = [*prompt.prompt_tokens, *[pad_id] * max_new_tokens]
        if used + len(tokens) > seq_length and rows[-1]:
            rows.append([])
            used = 0
        slots.append(_Slot(index, len(rows) - 1, used, len(prompt.prompt_tokens)))
        rows[-1].append(
            Document(
                f"prompt-{index}", tokens, [0] * len(tokens), list(prompt.visual_positions), list(prompt.frames),
                prompt.specialties,
            )
        )
        used += -(-len(tokens) // document_multiple) * document_multiple
    return [pack(documents, seq_length, pad_id, document_multiple) for documents in rows], slots


def _best_tokens(
    model: PlacedModel, mesh: Mesh, inputs: Sequence[LanguageInput], seq_length: int, vocab_size: int
) -> Tensor:
    """The likeliest token after each position, [rows, S], on every rank of the replica."""

    def finish(output: Tensor, item: LanguageInput) -> tuple[Tensor, Tensor]:
        best_S = torch.zeros(seq_length, dtype=torch.int64, device=output.device)
        best_S[item.row_index_S] = _argmax(output[0], mesh, vocab_size)
        return output.new_zeros(()), best_S

    parts = run_schedule(model.language, inputs, finish, with_labels=False, train=False)
    best = torch.zeros(len(inputs), seq_length, dtype=torch.int64, device=inputs[0].tokens_BS.device)
    if mesh.is_last_stage and mesh.language.tp.rank() == 0:
        best += torch.stack(parts)
    dist.all_reduce(best, group=mesh.replica)
    return best


def _argmax(logits_SV: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    """Argmax over a vocabulary that is split over the tensor-parallel ranks, without gathering the logits."""
    group = mesh.language.tp
    start = group.rank() * logits_SV.shape[1]
    ids = torch.arange(start, start + logits_SV.shape[1], device=logits_SV.device)
    value, index = logits_SV.float().masked_fill(ids >= vocab_size, float("-inf")).max(dim=1)
    pairs = torch.stack([value.double(), (index + start).double()])
    gathered = [torch.empty_like(pairs) for _ in range(group.size())]
    dist.all_gather(gathered, pairs, group=group)
    values, indices = torch.stack(gathered).unbind(dim=1)
    return indices.gather(0, values.argmax(dim=0, keepdim=True))[0].long()


def _all_ended(answers: dict[int, list[int]], end_id: int, device: torch.device) -> bool:
    open_answers = torch.tensor(sum(end_id not in answer for answer in answers.values()), device=device)
    dist.all_reduce(open_answers)
    return open_answers.item() == 0


def _gather(answers: dict[int, list[int]], count: int, end_id: int) -> list[list[int]]:
    everyone: list[dict[int, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, answers)
    merged = {index: answer for part in everyone for index, answer in part.items()}
    return [a[: a.index(end_id)] if end_id in a else a for a in (merged[i] for i in range(count))]
