"""Voxels from storage straight into the GPU's memory: GPUDirect Storage.

DALI's own way to it, `readers.numpy(device="gpu")`, goes over a list of files that is fixed when the pipeline is
built, and reads all of a file to cut a slice out of it (NVIDIA/DALI, issue 5782). Here each step asks for other
slices, so they are read with torch's binding of the same library, cuFile, and given to DALI where they lie.

Not yet measured on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megamed.data.frames.raw import Cache, Stretch
from megamed.utils import UserError

# Files that are kept open and known to cuFile.
_OPEN_FILES = 64


class DirectReader:
    """Reads stretches of files into the memory of a device; any thread may.

    Args:
        device: where to.
        stream: whose memory is taken: reads do not wait for what other streams still do with theirs.
        open_file: opens a file by path and flags, for reading into a torch storage; cuFile's where left out.

    Raises:
        UserError: there is no GPU.
    """

    def __init__(
        self, device: torch.device, stream: torch.cuda.Stream | None, open_file: Callable[[str, int], Any] | None = None
    ):
        if open_file is None and device.type != "cuda":
            raise UserError("data.loader.gds reads into a GPU's memory, and there is no GPU; set data.loader.gds=false",
                            everywhere=True)
        self._device, self._stream = device, stream
        self._open = open_file or torch.cuda.gds.GdsFile
        self._files: Cache[Any] = Cache(_OPEN_FILES)

    def read(self, stretch: Stretch) -> Tensor:
        """A stretch, [C, H, W] of the file's type, on the device.

        Raises:
            UserError: the file cannot be read this way.
        """
        kind = torch.from_numpy(np.empty(0, stretch.dtype)).dtype
        with torch.cuda.stream(self._stream):
            voxels_CHW = torch.empty(stretch.shape, dtype=kind, device=self._device)
        try:
            file = self._files.get(stretch.path, lambda: self._open(stretch.path, os.O_RDONLY))
            file.load_storage(voxels_CHW.untyped_storage(), stretch.offset)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{stretch.path} cannot be read by GPUDirect Storage ({error}); it needs NVIDIA's driver "
                            "nvidia-fs and a file system that supports it, or set data.loader.gds=false") from error
        return voxels_CHW
