"""What the processes of a distributed training tell each other. Alone, a process is rank 0 of 1 and talks to itself."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0. What is written is written by rank 0."""
    return dist.get_rank() if world() > 1 else 0


def local_groups(groups: int) -> range:
    """Those mix groups of a batch that this process takes."""
    share = groups // world()
    return range(rank() * share, (rank() + 1) * share)


def gather_ranks(values: Shaped[Tensor, "here ..."]) -> Shaped[Tensor, "everywhere ..."]:
    """The values of all processes, in the order of their ranks.

    Carries no gradient. Every process calls it, with values of the same shape.
    """
    if world() == 1:
        return values
    everywhere = values.new_empty((world() * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(everywhere, values.detach().contiguous())
    return everywhere


def mean_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each by its mean over all processes, in one message. Every process calls it, with tensors of the same shapes and type."""
    if world() == 1 or not tensors:
        return
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is true in any process. Every process calls it. Goes through the host: a device is not waited for."""
    if world() == 1:
        return list(flags)
    found: list[bool] = gather_ranks(torch.tensor([flags])).any(dim=0).tolist()
    return found


def from_rank_zero(flags: list[bool]) -> list[bool]:
    """What rank 0 says. Every process calls it, with equally many flags."""
    if world() == 1 or not flags:
        return flags
    found: list[bool] = gather_ranks(torch.tensor([flags]))[0].tolist()
    return found


def wait_for_all() -> None:
    """Until every process has come here."""
    any_rank(False)


def say(text: str) -> None:
    """Print it once, however many processes train."""
    if rank() == 0:
        print(text, flush=True)
