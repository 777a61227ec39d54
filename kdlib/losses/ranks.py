"""What the processes of a distributed training tell each other."""

import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def everyones(values: Shaped[Tensor, "here ..."]) -> Shaped[Tensor, "everywhere ..."]:
    """The values of all processes, in the order of their ranks; without other processes the values themselves.

    Carries no gradient. Every process calls it, with values of the same shape.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    everywhere = values.new_empty((dist.get_world_size() * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(everywhere, values.detach().contiguous())
    return everywhere
