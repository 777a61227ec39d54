"""A study as a Slurm job, through submitit: asked for, begun on each of its machines, saved before they are taken away, and gone on with.

submitit has Slurm warn a job before its time is over or it is pre-empted, calls ``NodeTask.checkpoint`` then, and puts the job into the
queue again. Where Slurm does the latter itself it only sends SIGTERM, to every process, and that is enough to save.
"""

import contextlib
import io
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil
from submitit import JobEnvironment, SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import DelayedSubmission

from kdlib import config
from kdlib.config.schema import Launch
from kdlib.errors import Refused, refuse
from kdlib.parallel.launch import RENDEZVOUS
from kdlib.parallel.signals import stop_children

JOBS = Path(".state/slurm")  # of the study: a folder for each job, with what it is to do and what it says
TOOLS = ("sbatch", "srun", "scontrol", "squeue")
LEAST_HOURS = 0.05  # below it Slurm, which is early by up to a minute, would warn a job as soon as it begins
WARNING_SECONDS = 60  # before its time is over
SECONDS_TO_SAVE = 20  # twice what a study needs: it is ended then
TIMES = 365  # that a job may use up its hours
MEET_SECONDS = 120  # for all machines to show that they see the study; submitit itself waits one minute for what it has to do
LAST_SECONDS = 300  # for the other machines, when the first has ended: it tells them, but by a file, which a network may show later
LOOK_SECONDS = 0.5
FIRST_PORT, PORTS = 20_000, 10_000  # of the rendezvous: by the number of the job, so that two of them on one machine differ

# What Slurm signals it signals to every process of a job. dvc would die, and nobody wait for what it has begun to be saved; so what this
# starts is deaf, but for those that set it otherwise: a notebook, and whatever trains.
DEAF = ("sh", "-c", 'trap "" TERM USR2; exec "$@"', "sh")


@dataclass(frozen=True)
class Asked:
    """What a person asks Slurm for; study.launch says how many machines, and processes on each."""

    hours: float  # at a time: a job that used them up goes on in another turn
    partition: str | None  # None: Slurm's default
    gpus: int  # on each machine, one for each process; 0: train on its cores
    cores: int | None  # on each machine; None: one for each process
    options: list[str]  # of sbatch, as account=abc or exclusive


def submit_job(root: Path, asked: Asked) -> str:
    """Put the study into the queue; what to tell the person. Raises ``Refused``, with what Slurm said where it was Slurm that refused."""
    launch = config.load(root).study.launch
    _check(asked, launch)
    folder = root / JOBS / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    executor = SlurmExecutor(folder, max_num_timeout=TIMES)
    executor.update_parameters(**_parameters(root, asked, launch))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit says it there too
            job = executor.submit(NodeTask(root, folder))
    except (FailedJobError, FailedSubmissionError) as error:
        shutil.rmtree(folder, ignore_errors=True)  # submitit leaves there what it would have begun
        why = " ".join(str(error).replace("sbatch: error: ", "").split())
        raise Refused(f"sbatch: found {why!r}; allowed: what this cluster grants; `sinfo` shows its partitions and their limits") from None
    asked_state = ["squeue", "--noheader", f"--job={job.job_id}", "--format=%T (%r)"]  # with its reason, of a job that can never begin too
    state = subprocess.run(asked_state, check=False, capture_output=True, text=True).stdout.strip() or "submitted"
    return (
        f"job {job.job_id}: {state}\n"
        f"What it says: {job.paths.stdout} (nothing there once it runs: its machine does not see this folder)\n"
        f"It goes on by itself after pre-emption and after every {asked.hours:g} h; `scancel {job.job_id}` ends it, "
        "and the same command goes on from there"
    )


def _check(asked: Asked, launch: Launch) -> None:
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise Refused(f"{tool}: found none on PATH; allowed: Slurm's; submit from a machine where `sinfo` answers")
    if not LEAST_HOURS <= asked.hours < math.inf:
        raise Refused(f"--hours: found {asked.hours:g}; allowed: {LEAST_HOURS} or more; ask for what a partition grants at a time")
    if asked.gpus and asked.gpus != launch.processes:
        allowed = f"{asked.gpus}, one for each GPU that --gpus asks for on a machine"
        raise refuse("study.launch.processes", launch.processes, allowed, "change one of the two")


def _parameters(root: Path, asked: Asked, launch: Launch) -> dict[str, object]:
    cores = asked.cores or launch.processes
    options = (option.partition("=") for option in asked.options)
    wanted: dict[str, object] = {
        "job_name": f"kdlib-{root.name}",
        "time": math.ceil(asked.hours * 60),
        "nodes": launch.nodes,
        "ntasks_per_node": 1,  # which starts the processes
        "cpus_per_task": cores,
        "signal_delay_s": WARNING_SECONDS,
        "stderr_to_stdout": True,
        "srun_args": [f"--cpus-per-task={cores}", f"--wait={LAST_SECONDS}"],  # srun does not take over the job's
    }
    wanted |= {key: value for key, value in (("partition", asked.partition), ("gpus_per_node", asked.gpus)) if value}
    return wanted | {"additional_parameters": {"requeue": True} | {key: value or True for key, _, value in options}}


@dataclass
class NodeTask:
    """What submitit calls on each machine of a job, each time that it begins: the first runs the study, the others join it."""

    root: Path
    folder: Path  # of the job, below JOBS
    study: subprocess.Popen[bytes] | None = None  # the process that does it

    def __call__(self) -> None:
        job = JobEnvironment()
        meeting = self.folder / f"turn_{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        meeting.mkdir(parents=True, exist_ok=True)
        (meeting / str(job.node)).touch()
        try:
            if job.node == 0:
                self._meet(job, meeting)
                sys.exit(self._do("run", job))
            self._do("join", job, until=meeting / "ended")
        except Refused as error:
            sys.exit(str(error))
        finally:
            if job.node == 0:
                (meeting / "ended").touch()

    def checkpoint(self) -> DelayedSubmission:
        """Have the study saved. Returns what to do when the job begins again."""
        self._stop()
        return DelayedSubmission(NodeTask(self.root, self.folder))

    def _meet(self, job: JobEnvironment, meeting: Path) -> None:
        """Wait until all machines have shown that they see the study. Raises ``Refused``."""
        nodes = config.load(self.root).study.launch.nodes
        if nodes != job.num_nodes:
            raise refuse("study.launch.nodes", nodes, f"the {job.num_nodes} that this job was submitted for", "submit it again")
        until = time.monotonic() + MEET_SECONDS
        while missing := [host for node, host in enumerate(job.hostnames) if not (meeting / str(node)).exists()]:
            if time.monotonic() > until:
                found = f"found no sign of {', '.join(missing)} there after {MEET_SECONDS} s"
                raise Refused(f"{self.root}: {found}; allowed: a folder that all machines share; move the project to one")
            time.sleep(LOOK_SECONDS)

    def _do(self, what: str, job: JobEnvironment, until: Path | None = None) -> int:
        """`python -m kdlib.study run` or `join`, to its end, or until there is a file; its exit status."""
        chosen = {RENDEZVOUS: f"{job.hostnames[0]}:{FIRST_PORT + int(job.raw_job_id) % PORTS}"} if job.num_nodes > 1 else {}
        self.study = subprocess.Popen([*DEAF, sys.executable, "-m", "kdlib.study", what], cwd=self.root, env=os.environ | chosen)
        while (status := self.study.poll()) is None:
            if until and until.exists():
                self._stop()
            time.sleep(LOOK_SECONDS)
        return status

    def _stop(self) -> None:
        """Have all that this machine trains saved and ended."""
        stop_children()
        if self.study:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.study.wait(SECONDS_TO_SAVE)
        for left in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
