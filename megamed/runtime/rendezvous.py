"""How the ranks of one start of a job meet, when torchrun has started them before.

torchrun keeps one store over all restarts. What ranks left there the last time, addresses for instance, would be taken
for this time's, and all would wait for processes that are gone. So each start has a part of the store of its own, with
a name that rank 0 makes up. A count of restarts would not do: nodes may count differently.
"""

import time
import uuid

import torch.distributed as dist

from megamed.utils import UserError

_PAUSE_S = 0.02


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """A part of a store that only the ranks of this start use. Collective.

    Every rank leaves a word of its own; rank 0 answers each with that word and the name, so that an answer to a word
    of an earlier start is known for what it is; and every rank says that it has read it.

    Args:
        store: that all ranks share; earlier starts may have used it.
        rank, world_size: as usual.
        timeout_s: seconds for all of them to come.

    Raises:
        UserError: some did not.
    """
    end = time.monotonic() + timeout_s
    if rank:
        word = uuid.uuid4().hex
        store.set(f"megamed/word/{rank}", word)
        while (answer := _read(store, f"megamed/answer/{rank}").split())[:1] != [word]:
            if time.monotonic() > end:
                raise UserError(f"rank 0 did not come in {timeout_s / 60:g} minutes; look at the log of its node")
            time.sleep(_PAUSE_S)
        store.set(f"megamed/met/{answer[1]}/{rank}", "yes")
        return dist.PrefixStore(f"megamed/start/{answer[1]}", store)
    name, missing = uuid.uuid4().hex, dict.fromkeys(range(1, world_size), "")
    while missing:
        for other, answered in list(missing.items()):
            if _read(store, f"megamed/met/{name}/{other}"):
                del missing[other]
            elif (word := _read(store, f"megamed/word/{other}")) != answered:
                store.set(f"megamed/answer/{other}", f"{word} {name}")
                missing[other] = word
        if missing and time.monotonic() > end:
            some = ", ".join(map(str, list(missing)[:8])) + (", ..." if len(missing) > 8 else "")
            raise UserError(
                f"of {world_size} ranks {len(missing)} did not come in {timeout_s / 60:g} minutes ({some}); look at "
                "the logs of their nodes"
            )
        time.sleep(_PAUSE_S if missing else 0)
    return dist.PrefixStore(f"megamed/start/{name}", store)


def _read(store: dist.Store, key: str) -> str:
    """What is there, or nothing."""
    return store.get(key).decode() if store.check([key]) else ""
