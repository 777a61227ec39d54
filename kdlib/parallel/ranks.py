"""Communication between the processes of a distributed training. Alone, a process is rank 0 of 1 and talks to itself."""

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0. Rank 0 writes all files."""
    return dist.get_rank() if world() > 1 else 0


def local_groups(groups: int) -> range:
    """The mix groups of a batch that this process takes, of ``groups`` in all."""
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
    in_any: list[bool] = gather_ranks(torch.tensor([flags])).any(dim=0).tolist()
    return in_any


def from_rank_zero(flags: list[bool]) -> list[bool]:
    """The flags of rank 0. Every process calls it, with equally many flags."""
    if world() == 1 or not flags:
        return flags
    first: list[bool] = gather_ranks(torch.tensor([flags]))[0].tolist()
    return first


def wait_for_all() -> None:
    """Wait until every process has come here."""
    any_rank(False)


def say(text: str) -> None:
    """Print a line once, however many processes train."""
    if rank() == 0:
        print(text, flush=True)
