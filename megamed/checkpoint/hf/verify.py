"""Whether a checkpoint has the weights of a Hugging Face folder: every tensor, bit by bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamed.checkpoint.card import describe_model, differing_key, model_of
from megamed.checkpoint.hf.bridge import Outgoing, same_bits
from megamed.checkpoint.hf.convert import Folder
from megamed.checkpoint.hf.names import stored
from megamed.checkpoint.weights import Weights
from megamed.utils import UserError


@dataclass(frozen=True)
class Compared:
    """A tensor on both sides.

    Attributes:
        name: in the folder.
        is_same: type, shape and every bit.
        difference: largest one, as fp32 numbers; 0 where only the type differs.
    """

    name: str
    is_same: bool
    difference: float


def compare(folder: Folder, checkpoint: Path) -> Iterator[Compared]:
    """Compare all tensors of a folder with what a checkpoint would give back for them.

    Raises:
        UserError: the checkpoint is of another model, or has parameters that the folder lacks.
    """
    if differing := differing_key(describe_model(folder.model), describe_model(model_of(checkpoint))):
        key, theirs, ours = differing
        raise UserError(f"{checkpoint}: is of another model: model.{key} is {ours}, and {theirs} in {folder.path}")
    weights = Weights(checkpoint)
    outgoing = Outgoing(weights, folder.table, dict(stored(weights)))
    if lacking := sorted(set(outgoing.shapes()) - set(folder.source.names)):
        raise UserError(f"{folder.path}: lacks {lacking[0]}, which {checkpoint} has")
    for name in folder.source.names:
        if folder.table.is_left_out(name):
            continue
        theirs_, ours_ = folder.source.read(name), outgoing.make(name)
        is_alike = theirs_.shape == ours_.shape and theirs_.dtype == ours_.dtype
        if is_alike and same_bits(theirs_, ours_):
            yield Compared(name, True, 0.0)
        elif theirs_.shape != ours_.shape:
            yield Compared(name, False, float("inf"))
        else:
            yield Compared(name, False, float((theirs_.float() - ours_.float()).abs().max()) if len(ours_) else 0.0)
