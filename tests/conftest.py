"""Fixtures that all tests share."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; before torch is imported

import megamed.runtime  # noqa: E402, F401  makes Megatron importable, before a test imports it
from megamed.testing.ranks import RankPool  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", metavar="FILE", help="write the table of parallel layouts to FILE")
    parser.addoption("--kills", type=int, default=4, help="how often a run is killed (default: 4)")
    parser.addoption("--many-ranks", action="store_true", help="also run layouts of more than 8 ranks: minutes each")


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Gloo rank processes, started when first used."""
    pool = RankPool(timeout_s=1800.0 if request.config.getoption("--many-ranks") else 300.0)
    yield pool
    pool.close()
