"""Sizes of the parallel layout, and the arithmetic that ties them to the world size."""

from dataclasses import dataclass

from megamed.utils import UserError


@dataclass
class ParallelConfig:
    """How one job is laid out over its ranks. Sizes are in ranks.

    World size = tensor x pipeline x context x data. The expert sizes divide the same ranks a
    second time: expert x expert_tensor must divide tensor x context x data.
    """

    tensor: int = 1
    """Ranks that share every weight matrix of the language model."""
    pipeline: int = 1
    """Ranks that share the language model's layers."""
    virtual_pipeline: int = 1
    """Chunks of layers a pipeline rank holds; above 1 selects the interleaved schedule."""
    context: int = 1
    """Ranks that share one sequence; `attention.ring` x `attention.ulysses`."""
    use_ring_attention: bool = False
    """Attention over the context ranks by megamed's own ring attention; the same as `attention.backend=ring`."""
    expert: int = 1
    """Ranks that share the experts of a mixture-of-experts layer."""
    expert_tensor: int = 1
    """Ranks that share every weight matrix of one expert."""
    data: int | None = None
    """Model replicas; None takes all ranks that the other sizes leave."""
    sequence: bool = False
    """Split the activations between tensor-parallel regions along the sequence."""

    def data_size(self, world_size: int) -> int:
        """Check every size against the world size and return the number of model replicas.

        Raises:
            UserError: a size is wrong or the product is not the world size; says the arithmetic.
        """
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
            _need(getattr(self, name) >= 1, f"parallel.{name}={getattr(self, name)} must be 1 or more")
        model = self.tensor * self.pipeline * self.context
        product = f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
        if self.data is None:
            _need(
                world_size % model == 0,
                f"parallel: {product} = {model} does not divide the world size {world_size}; "
                f"start a multiple of {model} ranks or change a size",
            )
        data = world_size // model if self.data is None else self.data
        _need(data >= 1, f"parallel.data={data} must be 1 or more")
        _need(
            model * data == world_size,
            f"parallel: {product} x data {data} = {model * data}, but the world size is {world_size}; "
            f"start {model * data} ranks or set parallel.data={world_size / model:g}",
        )
        experts = self.expert * self.expert_tensor
        _need(
            (self.tensor * self.context * data) % experts == 0,
            f"parallel: expert {self.expert} x expert_tensor {self.expert_tensor} = {experts} does not "
            f"divide tensor {self.tensor} x context {self.context} x data {data} = "
            f"{self.tensor * self.context * data}",
        )
        _need(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline={self.virtual_pipeline} needs parallel.pipeline above 1",
        )
        _need(
            not (self.expert > 1 and self.tensor > 1 and not self.sequence),
            "parallel.expert with parallel.tensor needs parallel.sequence=true",
        )
        return data


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message, everywhere=True)
