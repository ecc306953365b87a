"""The CPU backend answers Megatron's CUDA calls, and stays out where there is a GPU."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from megamed.runtime import cpu_backend
from megamed.testing.ranks import RankPool


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, where nothing is patched or imported yet."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)


def test_with_a_gpu_nothing_is_replaced_and_enabling_is_refused() -> None:
    done = python(
        """
        import torch
        torch.cuda.is_available = lambda: True  # what a machine with a GPU answers
        before = {name: getattr(torch, name) for name in dir(torch)}
        methods = {name: getattr(torch.Tensor, name) for name in dir(torch.Tensor)}
        cuda = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
        collective = torch.distributed.all_to_all_single

        from megamed.runtime.device import prepare_megatron
        from megamed.runtime import cpu_backend, device_type

        prepare_megatron()
        assert device_type() == "cuda" and not cpu_backend.is_enabled()
        del before["manual_seed"]  # torch's own compiler wraps it when Megatron imports that
        for owner, names in ((torch, before), (torch.Tensor, methods), (torch.cuda, cuda)):
            assert not [name for name, value in names.items() if callable(value) and getattr(owner, name) != value]
        assert torch.distributed.all_to_all_single is collective
        try:
            cpu_backend.enable()
        except RuntimeError as error:
            print(error)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "this one has a GPU" in done.stdout


def test_it_comes_before_megatron_or_not_at_all() -> None:
    done = python(
        """
        import torch, sys, types
        sys.modules["megatron.core"] = types.ModuleType("megatron.core")
        from megamed.utils import UserError
        import importlib.util
        spec = importlib.util.find_spec("megamed")
        import pathlib
        path = pathlib.Path(spec.origin).parent / "runtime" / "cpu_backend.py"
        module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("backend", path))
        module.__spec__.loader.exec_module(module)
        try:
            module.enable()
        except RuntimeError as error:
            print(error)
        """
    )
    assert "before the first import of megatron.core" in done.stdout, done.stderr


def test_megatron_on_disk_is_the_published_one() -> None:
    """Every file is as its wheel recorded it: the backend changes nothing on disk."""
    import base64
    import hashlib
    from importlib.metadata import distribution

    files = [f for f in distribution("megatron-core").files or [] if f.suffix == ".py" and f.hash]
    assert len(files) > 200
    for file in files:
        digest = base64.urlsafe_b64encode(hashlib.sha256(file.locate().read_bytes()).digest()).rstrip(b"=").decode()
        assert digest == file.hash.value, f"{file} differs from the wheel's"


@pytest.mark.skipif(not cpu_backend.is_enabled(), reason="a GPU is present, so the CPU backend is off")
class TestAnswers:
    def test_factories_take_cuda_and_pinned_memory(self) -> None:
        for made in (
            torch.zeros(2, device="cuda"),
            torch.empty(2, device=torch.cuda.current_device()),
            torch.tensor([1], device=torch.device("cuda"), pin_memory=True),
            torch.empty_like(torch.ones(2), device="cuda:0"),
            torch.ones(2).cuda().pin_memory(),
        ):
            assert made.device.type == "cpu"

    def test_other_devices_are_left_alone(self) -> None:
        assert torch.zeros(2, device="meta").device.type == "meta"
        with torch.device("meta"):
            assert torch.empty(3).device.type == "meta"

    def test_only_megatron_hears_of_cuda_types(self) -> None:
        tensor = torch.zeros(1)
        assert tensor.type() == "torch.FloatTensor"
        seen: dict[str, object] = {"__name__": "megatron.core.optimizer", "tensor": tensor}
        exec("name = tensor.type()", seen)
        assert seen["name"] == "torch.cuda.FloatTensor"

    def test_the_cuda_random_state_is_the_cpu_one(self) -> None:
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)

    def test_streams_and_events_do_nothing(self) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream())
            event.wait()
            assert event.query()
        torch.cuda.synchronize()


def unequal_parts() -> tuple[list[float], list[float], list[float]]:
    """Gather parts of 1, 2 and 3 rows, scatter parts of as many, and gather equal ones, on three ranks."""
    rank, sizes = dist.get_rank(), [1, 2, 3]
    gathered = [torch.empty(size, 1) for size in sizes]
    dist.all_gather(gathered, torch.full((sizes[rank], 1), rank + 1.0))
    scattered = torch.empty(sizes[rank], 1)
    dist.reduce_scatter(scattered, [torch.full((size, 1), 10.0 ** rank * size) for size in sizes])
    equal = [torch.empty(1) for _ in sizes]
    dist.all_gather(equal, torch.tensor([float(rank)]))
    return torch.cat(gathered).flatten().tolist(), scattered.flatten().tolist(), torch.cat(equal).tolist()


@pytest.mark.skipif(not cpu_backend.is_enabled(), reason="a GPU is present, so the CPU backend is off")
def test_parts_of_unequal_sizes_are_gathered_and_scattered(ranks: RankPool) -> None:
    for size, (gathered, scattered, equal) in zip((1, 2, 3), ranks.run(unequal_parts, 3), strict=True):
        assert gathered == [1, 2, 2, 3, 3, 3]
        assert scattered == [111.0 * size] * size
        assert equal == [0, 1, 2]
