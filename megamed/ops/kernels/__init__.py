"""Block kernels: attention of one block, chosen by name or by what the device has."""

import functools

import torch

from megamed.ops.kernels.base import BlockKernel
from megamed.ops.kernels.cuda import Cudnn, FlashAttn2, FlashAttn3, FlashAttn4, TorchFlash
from megamed.ops.kernels.reference import CpuFlash, Math
from megamed.utils import UserError

__all__ = ["KERNELS", "BlockKernel", "named_kernel", "pick_kernel"]

KERNELS: dict[str, BlockKernel] = {
    kernel.name: kernel
    for kernel in (Math(), CpuFlash(), TorchFlash(), Cudnn(), FlashAttn2(), FlashAttn3(), FlashAttn4())
}


def named_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> BlockKernel:
    """The kernel of that name.

    Args:
        name: one of `KERNELS`.
        device, dtype, head_dim: what it is to work on.

    Raises:
        UserError: there is none of that name, or it cannot run here.
    """
    if name not in KERNELS:
        raise UserError(f"attention.kernel={name} is none of {', '.join(KERNELS)}", everywhere=True)
    if (why := KERNELS[name].unavailable(device, dtype, head_dim)) is not None:
        raise UserError(f"attention.kernel={name} {why}", everywhere=True)
    return KERNELS[name]


def pick_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, num_documents: int = 1) -> BlockKernel:
    """The fastest kernel that can run here.

    Args:
        device, dtype, head_dim: what it is to work on.
        num_documents: of the row. cuDNN's kernel is for a row that is one document, and hence for blocks that have
            the same lengths every time: it plans each length anew.
    """
    return _pick(device, dtype, head_dim, num_documents == 1)


@functools.cache
def _pick(device: torch.device, dtype: torch.dtype, head_dim: int, one_document: bool) -> BlockKernel:
    order: tuple[str, ...] = ("math",)
    if dtype != torch.float64 and device.type in ("cpu", "meta"):
        order = ("cpu_flash",)
    elif device.type == "cuda":
        hopper = torch.cuda.get_device_capability(device) >= (9, 0)
        cudnn = ("cudnn",) if hopper and one_document else ()
        order = ("flash_attn_3", *cudnn, "flash_attn", "torch_flash", "math")
    return next(KERNELS[name] for name in order if KERNELS[name].unavailable(device, dtype, head_dim) is None)
