"""A job of one process, for modules that need Megatron's process groups."""

from collections.abc import Iterator

import pytest

from megamed import runtime


@pytest.fixture(scope="module")
def mesh() -> Iterator[runtime.Mesh]:
    """The mesh of a process that is a job of its own."""
    runtime.start()
    mesh = runtime.build_mesh(runtime.ParallelConfig())
    runtime.seed_everything(1234, 0)
    yield mesh
    runtime.destroy_mesh()
    runtime.stop()
