"""Several processes that train the same runs together, started and watched as torchrun does: on this machine, or on several."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdlib.config import Launch
from kdlib.train import progress
from kdlib.train.signals import Stopped, asked_to_stop, held_back, stop_children

LOOK_SECONDS = 0.5  # between two looks at whether all are alive
Result = TypeVar("Result")


class RankFailed(RuntimeError):
    """One of the processes that trained together has died; the others were ended."""


def together(launch: Launch, work: Callable[[], Result], raises: type[Exception]) -> Result:
    """``work`` in every process at once; what it returns in the first one of this machine. It must be picklable.

    Raises ``RankFailed``, with the number of the process that failed first, ``Stopped`` after SIGINT or SIGTERM, when all have saved, and
    ``raises`` when ``work`` does, in all processes alike.
    """
    several = launch.nodes > 1
    config = LaunchConfig(
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=launch.processes,
        run_id="kdlib",
        rdzv_backend="c10d",
        rdzv_endpoint=str(launch.rendezvous) if several else "localhost:0",
        max_restarts=0,
        monitor_interval=LOOK_SECONDS,
        signals_to_handle="SIGHUP,SIGQUIT",  # of the others torch would leave its processes half a minute, and not fetch what they return
    )
    with held_back(stop_children):
        try:
            found = elastic_launch(config, _do)(work, raises)
        except ChildFailedError as error:
            if asked_to_stop():  # a process that has not begun to train ends at once
                raise Stopped("stopped; the same command goes on from the last step") from error
            number, failure = error.get_first_failure()
            how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            raise RankFailed(
                f"process {number} of {launch.processes * launch.nodes} that trained together ended with {how}: {failure.message}. "
                "The others were ended; run the same again to go on from the last checkpoint"
            ) from error
    result = found[min(found)]
    if isinstance(result, BaseException):
        raise result
    return result  # type: ignore[no-any-return]


@record
def _do(work: Callable[[], Result], raises: type[Exception]) -> Result | BaseException:
    """In each process."""
    progress.to_log()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        return work()
    except (Stopped, raises) as error:
        return error
    finally:
        dist.destroy_process_group()
