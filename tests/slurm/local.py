"""Slurm on this machine alone, as root, from Debian's slurm-wlm and munge: one controller and two machines, without accounting and cgroups.

python -m tests.slurm.local start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
python -m tests.slurm.local stop FOLDER
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

NODES = ("127.0.0.1", "127.0.0.2")  # names that are found without a name server
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
WAIT = 30  # seconds, for all to be there
CONF = """
ClusterName=tests
SlurmctldHost={host}
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
KillWait=15
ReturnToService=2
{nodes}
PartitionName=low Nodes={names} Default=YES MaxTime=24:00:00 PriorityTier=1 State=UP
PartitionName=high Nodes={names} MaxTime=1:00:00 PriorityTier=2 State=UP
"""


def missing() -> list[str]:
    """What of Slurm is not installed here; ["root"] where it cannot be started for want of rights."""
    return [name for name in NEEDED if shutil.which(name) is None] or ([] if os.geteuid() == 0 else ["root"])


def start(folder: Path) -> Path:
    """Start it, wait until both machines are idle; the configuration, for SLURM_CONF."""
    folder.mkdir(parents=True, exist_ok=True)
    conf, host = folder / "slurm.conf", socket.gethostname()
    port, *ports = _free_ports(1 + len(NODES))
    nodes = [f"NodeName={name} NodeHostname={host} NodeAddr={name} Port={its} CPUs=4" for name, its in zip(NODES, ports, strict=True)]
    conf.write_text(CONF.format(host=host, port=port, folder=folder, nodes="\n".join(nodes), names=",".join(NODES)))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    places = [f"--{option}={folder}/munge.{option.removesuffix('-file')}" for option in ("key-file", "log-file", "pid-file", "seed-file")]
    daemons = [["munged", "--force", f"--socket={folder}/munge.socket", *places], ["slurmctld", "-c", "-f", str(conf)]]
    for daemon in [*daemons, *(["slurmd", "-c", "-f", str(conf), "-N", name] for name in NODES)]:
        subprocess.run(daemon, check=True)
    until = time.monotonic() + WAIT
    while _states(conf) != ["idle"] * len(NODES):
        if time.monotonic() > until:
            raise TimeoutError(f"Slurm did not start within {WAIT} s; see the logs in {folder}")
        time.sleep(0.2)
    return conf


def stop(folder: Path) -> None:
    """End all that `start` began; jobs are cancelled first."""
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    subprocess.run(["scancel", "--full", "--user=root"], env=environment, check=False)
    for name in ("slurmctld", *(f"slurmd.{node}" for node in NODES), "munge"):
        with suppress(FileNotFoundError, psutil.NoSuchProcess):
            daemon = psutil.Process(int((folder / f"{name}.pid").read_text()))
            if any(str(folder) in word for word in daemon.cmdline()):  # the file may be older than a process of this number
                daemon.terminate()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in opened:
            one.bind(("", 0))
        return [int(one.getsockname()[1]) for one in opened]


def _states(conf: Path) -> list[str]:
    asked = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
    return subprocess.run(asked, env=os.environ | {"SLURM_CONF": str(conf)}, capture_output=True, text=True, check=False).stdout.split()


if __name__ == "__main__":
    print({"start": start, "stop": stop}[sys.argv[1]](Path(sys.argv[2]).resolve()))
