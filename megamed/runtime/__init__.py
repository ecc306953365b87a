"""Devices, processes, random seeds and the mesh of ranks. Importing it makes Megatron importable."""

from megamed.runtime.device import prepare_megatron

prepare_megatron()  # before the first import of megatron.core, here and in every module that imports this one

from megamed.runtime.config import ParallelConfig  # noqa: E402
from megamed.runtime.cpu_backend import meta_device  # noqa: E402
from megamed.runtime.device import (  # noqa: E402
    current_device,
    default_dtype,
    device_type,
    has_transformer_engine,
    peak_memory_bytes,
    set_device,
    synchronize,
)
from megamed.runtime.mesh import Mesh, build_mesh, destroy_mesh  # noqa: E402
from megamed.runtime.process import global_rank, ranks_per_node, run, start, stop, world_size  # noqa: E402
from megamed.runtime.seeds import rng_state, seed_everything, set_rng_state  # noqa: E402
from megamed.runtime.stopwatch import Stopwatch  # noqa: E402

__all__ = [
    "Mesh",
    "ParallelConfig",
    "Stopwatch",
    "build_mesh",
    "current_device",
    "default_dtype",
    "destroy_mesh",
    "device_type",
    "global_rank",
    "has_transformer_engine",
    "meta_device",
    "peak_memory_bytes",
    "prepare_megatron",
    "ranks_per_node",
    "rng_state",
    "run",
    "seed_everything",
    "set_device",
    "set_rng_state",
    "start",
    "stop",
    "synchronize",
    "world_size",
]
