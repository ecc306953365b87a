"""Fixtures that all tests share."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; before torch is imported

import megamed.runtime  # noqa: E402, F401  makes Megatron importable, before a test imports it
from megamed.testing.ranks import RankPool  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", metavar="FILE", help="write the table of parallel layouts to FILE")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo rank processes, started when first used."""
    pool = RankPool(8)
    yield pool
    pool.close()
