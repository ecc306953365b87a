"""Ranks of one start meet, whatever earlier starts left in torchrun's store."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megamed.runtime.rendezvous import fresh_store
from megamed.utils import UserError


def meet(store: dist.Store, ranks: int, timeout_s: float = 20.0) -> list[dist.Store]:
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: fresh_store(store, rank, ranks, timeout_s), range(ranks)))


def test_each_start_has_a_store_of_its_own() -> None:
    shared = dist.HashStore()
    for start in range(3):
        stores = meet(shared, 4)
        assert not stores[2].check(["key"]), "what the last start left is not seen"
        stores[1].set("key", str(start))
        assert [store.get("key") for store in stores] == [str(start).encode()] * 4


def test_a_start_that_was_cut_short() -> None:
    shared = dist.HashStore()
    # Ranks 1 and 2 of a start that rank 0 never came to, and the answers of one that rank 1 died in.
    for rank in (1, 2):
        shared.set(f"megamed/word/{rank}", "old")
        shared.set(f"megamed/answer/{rank}", "old name")
    shared.set("megamed/met/name/1", "yes")
    stores = meet(shared, 3)
    stores[0].set("key", "new")
    assert [store.get("key") for store in stores] == [b"new"] * 3


def test_who_is_missing_is_said() -> None:
    with pytest.raises(UserError, match=r"of 3 ranks 2 did not come in 0.005 minutes \(1, 2\); look at"):
        fresh_store(dist.HashStore(), 0, 3, 0.3)
    with pytest.raises(UserError, match="rank 0 did not come in 0.005 minutes"):
        fresh_store(dist.HashStore(), 2, 3, 0.3)
