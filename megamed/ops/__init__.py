"""Functions of tensors and a process group: ring attention, chunked cross-entropy."""
