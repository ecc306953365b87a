"""Pools that cannot work are named before anything starts."""

import sys
from typing import Any

import pytest

from megamed.data.specialties import MatchRule
from megamed.models.moe import MoEConfig, PoolConfig
from megamed.models.moe import config as config_module
from megamed.runtime import ParallelConfig
from megamed.utils import UserError


def moe(sizes: dict[str, int], **values: Any) -> MoEConfig:
    return MoEConfig(pools={name: PoolConfig(size) for name, size in sizes.items()}, **values)


LABELLED = MoEConfig(pools={"chest": PoolConfig(2, labels=["Lung"]), "lung": PoolConfig(2)})
SHARED = MoEConfig(pools={"chest": PoolConfig(2, labels=["x-ray"]), "bone": PoolConfig(2, labels=["X-ray"])})
MISSPELT = MoEConfig(pools={"neuro": PoolConfig(2, match=[MatchRule(keywords=["brain", "strok"])])})
RULED = MoEConfig(pools={"general": PoolConfig(2, match=[MatchRule(modality=["CT"])]), "bone": PoolConfig(2)})


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (moe({"general": 4, "chest": 6}), {"expert": 4}, "pools.chest.num_experts: 6 experts.*make it 8"),
        (MoEConfig(num_experts=6), {"expert": 4}, "num_experts: is 6, which parallel.expert=4"),
        (MoEConfig(), {"expert": 2}, "parallel.expert=2 needs experts"),
        (moe({"a": 4}, num_experts=8), {}, "num_experts: is 8, and the pools say"),
        (moe({"a": 0, "b": 2}), {}, r"pools\.a: num_experts is 0"),
        (moe({"Chest CT": 2}), {}, "is no name for a pool"),
        (LABELLED, {}, r"pools\.lung: overlaps pool chest: both are called by the label lung"),
        (SHARED, {}, r"pools\.bone: overlaps pool chest: both are called by the label X-ray"),
        (RULED, {}, r"pools\.general: is called by every token"),
        (moe({"general": 1, "chest": 1}, routing="hard", top_k=3), {}, "top_k: is 3"),
        (moe({"general": 1, "chest": 1, "x": 2}, routing="hard", top_k=3), {}, "chest: with routing=hard.*2 experts"),
        (MoEConfig(num_experts=4, routing="soft"), {}, "routing: is soft, which needs pools"),
        (MoEConfig(num_experts=4), {"tensor": 2}, "need parallel.sequence=true"),
        (moe({"a": 4}, specialty_dropout=1.5), {}, "specialty_dropout: is 1.5"),
        (moe({f"p{i}": 1 for i in range(63)}), {}, "63 of them beside general; 62"),
        (MISSPELT, {}, r"pools\.neuro\.match: 'strok' is no keyword that ingest looks for; did you mean stroke"),
        (moe({"a": 4}, dispatcher="flex"), {}, "dispatcher: is flex, which needs parallel.expert or parallel.tensor"),
    ],
)
def test_what_cannot_work_is_named(config: MoEConfig, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.validate(ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("values", "device", "message"),
    [
        ({"grouped_gemm": True}, "cpu", "grouped_gemm: needs a GPU and Transformer Engine"),
        ({"dispatcher": "flex"}, "cpu", "dispatcher: is flex, which needs GPUs.*use alltoall"),
        ({"dispatcher": "flex"}, "cuda", "dispatcher.*needs deep_ep, which is not installed.*or use alltoall"),
    ],
)
def test_what_is_not_here_is_named(
    values: dict[str, Any], device: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "device_type", lambda: device)
    monkeypatch.setattr(config_module, "has_transformer_engine", lambda: False)
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(UserError, match=message):
        moe({"a": 4}, **values).validate(ParallelConfig(expert=2))


def test_what_can_work_passes() -> None:
    for config in (
        MoEConfig(),
        MoEConfig(num_experts=4),
        moe({"general": 4, "chest": 8}, routing="soft"),
        moe({"chest": 4, "neuro": 4}, routing="hard"),
    ):
        config.validate(ParallelConfig(expert=2) if config.total_experts else ParallelConfig())


def test_specialties_are_the_pools_but_general_in_order() -> None:
    config = moe({"chest": 1, "general": 1, "neuro": 2})
    assert [specialty.name for specialty in config.specialties] == ["chest", "neuro"]
    assert config.total_experts == 4
    assert MoEConfig(num_experts=4).specialties == ()
