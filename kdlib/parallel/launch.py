"""Several processes that train the same runs together, started and watched as torchrun does: on this machine, or on several."""

import os
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kdlib.config.schema import Launch
from kdlib.errors import Refused, refuse, refuse_full_disk
from kdlib.parallel.signals import Stopped, asked_to_stop, held_back, stop_children, to_log

LOOK_SECONDS = 0.5  # between two looks at whether all are alive, and whether there is work
JOIN_SECONDS = 600  # for all machines to come
LAST_WORDS_SECONDS = 3.0  # that a process with an error leaves to one that died without a word
WORK = "kdlib/work"
RENDEZVOUS = "KDLIB_RENDEZVOUS"  # environment variable: host:port of the machine that a cluster made the first
Result = TypeVar("Result")
Work = tuple[str, Callable[[], Any], type[Exception]]  # its name, what to do, what it may raise in all processes alike


class RankFailed(RuntimeError):
    """One of the processes that trained together has died; the others were ended."""


def on_cluster(launch: Launch) -> Launch:
    """The launch on the machines that a cluster has chosen, where one has: the rendezvous is at the first of them."""
    return launch.model_copy(update={"rendezvous": os.environ[RENDEZVOUS]}) if RENDEZVOUS in os.environ else launch


def run_distributed(launch: Launch, work: Callable[[], Result], raises: type[Exception]) -> Result:
    """``work`` in every process at once; what it returns in the first one of this machine. It must be picklable.

    On several machines this one is the first, which hosts the rendezvous; each other one has to ``join``.

    Raises ``RankFailed``, with the number of the process whose failure was seen first on this machine; ``Stopped`` after SIGINT or SIGTERM,
    when all have saved; ``raises`` when ``work`` does, in all processes alike; ``Refused`` when it does in any, and when machines do not
    come.
    """
    offered: Work = (uuid.uuid4().hex, work, raises)
    store = _meeting(launch, here=True) if launch.nodes > 1 else None
    if store:
        store.set(WORK, pickle.dumps(offered).hex())
    with held_back(stop_children):
        return _take_part(launch, offered)  # type: ignore[no-any-return]


def join(launch: Launch) -> None:
    """Take part in whatever the first machine trains, one thing after another, until SIGINT or SIGTERM."""
    if launch.nodes < 2:
        raise refuse("study.launch.nodes", launch.nodes, "2 or more machines to join", "change it, or run the study on this one")
    done = ""
    with held_back(stop_children):
        while not asked_to_stop():
            offered = _offered(launch)
            if offered is None or offered[0] == done:
                time.sleep(LOOK_SECONDS)
                continue
            done, _, raises = offered
            try:
                _take_part(launch, offered)
            except (Stopped, RankFailed, Refused, raises) as error:
                # the first machine says so too; what it is told to do next is done here too
                print(f"{error}; waiting for the first machine", file=sys.stderr, flush=True)


def _take_part(launch: Launch, offered: Work) -> Any:
    name, work, raises = offered
    host, _ = _address(launch)
    config = LaunchConfig(
        min_nodes=launch.nodes,
        max_nodes=launch.nodes,
        nproc_per_node=launch.processes,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.rendezvous or "localhost:0",
        rdzv_configs={"is_host": launch.nodes == 1, "join_timeout": JOIN_SECONDS},  # of several, `together` hosts it
        max_restarts=0,
        monitor_interval=LOOK_SECONDS,
        signals_to_handle="SIGHUP,SIGQUIT",  # of the others torch would leave its processes half a minute, and not fetch what they return
        # a machine need not be able to resolve its own name; as seen from the host of the rendezvous, its address is good for all
        local_addr=_own_address(launch) if launch.nodes > 1 else None,
    )
    try:
        results = elastic_launch(config, _do)(work, raises)
    except ChildFailedError as error:
        if asked_to_stop():  # a process that has not begun to train ends at once
            raise Stopped("stopped; the same command goes on from the last step") from error
        raise _failed(launch, *error.get_first_failure()) from error
    except RendezvousError as error:
        allowed = f"{launch.nodes} machines within {JOIN_SECONDS // 60} minutes"
        what = f"start `python -m kdlib.study join` on all but the first, and see that they reach {host}"
        raise refuse("study.launch.nodes", f"fewer machines ({error})", allowed, what) from error
    result = results[min(results)]
    if isinstance(result, BaseException):
        raise result
    return result


def _failed(launch: Launch, number: int, failure: ProcessFailure) -> Exception:
    reported = failure.error_file_data["message"]
    message = str(reported["message"] if isinstance(reported, dict) else failure.message)
    kind, _, text = message.partition(": ")
    if kind == Refused.__name__:
        return Refused(text)
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    return RankFailed(
        f"process {number} of {launch.processes * launch.nodes} that trained together ended with {how}: {message.strip()}. "
        "The others were ended; run the same again to go on from the last checkpoint"
    )


@record
def _do(work: Callable[[], Result], raises: type[Exception]) -> Result | BaseException:
    """In each process."""
    to_log()
    if on_gpu := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        with refuse_full_disk():
            return work()
    except (Stopped, raises) as error:
        return error
    except Refused:  # may be by this one alone: the first one writes, and may find no room
        raise
    except Exception:
        time.sleep(LAST_WORDS_SECONDS)  # most often it only misses another one, which is to be seen first
        raise
    finally:
        dist.destroy_process_group()


def _address(launch: Launch) -> tuple[str, int]:
    host, _, port = (launch.rendezvous or "localhost:0").rpartition(":")
    return host, int(port)


def _own_address(launch: Launch) -> str:
    """Of this machine, as one that reaches the host of the rendezvous. No packet is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(*_address(launch), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _meeting(launch: Launch, *, here: bool) -> TCPStore:
    return TCPStore(*_address(launch), is_master=here, wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=30))


def _offered(launch: Launch) -> Work | None:
    """What the first machine offers to do, if it is there. Pickled, as torch's own messages between processes are: the port is to be
    reachable by the machines of the training alone.
    """
    try:
        socket.create_connection(_address(launch), 1.0).close()  # asked first: torch would complain of each attempt
        store = _meeting(launch, here=False)
        return pickle.loads(bytes.fromhex(store.get(WORK).decode())) if store.check([WORK]) else None
    except (OSError, RuntimeError):  # not there yet, or just gone
        return None
