"""A study as one command: check, reproduce, show, and say what of the committed verdicts this machine reproduced.

python -m kdlib.study run [NAME]       what `make study` does; NAME: a folder of studies/; without it the study that one stands in
python -m kdlib.study join [NAME]      on every machine but the first of study.launch: train with it until interrupted
python -m kdlib.study submit [NAME] --hours H    `run` as a Slurm job on the machines of study.launch; --help shows what else to ask for
python -m kdlib.study check [NAME]     params.yaml alone, in seconds
python -m kdlib.study plan [NAME]      what it will cost, from a few steps (--steps; 0: without hours and memory); also build/plan.csv
python -m kdlib.study readme [NAME]    the headline between README's markers
python -m kdlib.study gc               what store and cache hold; with --free, delete what no study of the project uses at present
"""

import argparse
import fcntl
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from kdlib import config
from kdlib.errors import FILE, Refused
from kdlib.files import folder_bytes, read_json, write_csv, write_text
from kdlib.study.cli import refusals_in_one_line
from kdlib.study.cost import table
from kdlib.study.cost.estimate import total
from kdlib.study.report.readme import insert_between_markers
from kdlib.study.training.planned import DISTILL, TEACHERS
from kdlib.study.training.store import ANSWERS, Store, beside_dvc_cache, dvc_cache, project

STUDIES = "studies"  # of the project: all but the default one, which is the project's own folder
VERDICTS = "results/verdicts.csv"
PLAN = "build/plan.csv"
SHIPPED = ".state/shipped_verdicts.csv"  # without git: the verdicts that came with the files


def find_study(name: str | None) -> Path:
    """The folder of a study: the project's studies/``name``, or the one that we stand in. Raises ``Refused`` for one that is not there."""
    root = config.find_root()
    if name is None:
        return root
    there = {folder.name: folder for folder in _studies(root)[1:]}
    if name not in there:
        allowed = f"{', '.join(there) or 'none, there is no other study'}; leave it out for the default study"
        raise Refused(f"STUDY: found {name!r}; allowed: {allowed}")
    return there[name]


def check_study(root: Path) -> None:
    """Everything in params.yaml that can be wrong before data are there. Raises ``Refused``."""
    from kdlib.study.training.experiment import Experiment  # noqa: PLC0415 (3 s of imports that `gc` and `readme` do without)

    Experiment(root)


def plan(root: Path, steps: int) -> None:
    """Print what a study costs, and write it to build/plan.csv. Raises ``Refused`` for what fits neither memory nor disk."""
    from kdlib.study.cost.plan import CostPlan, check_disk  # noqa: PLC0415
    from kdlib.study.training.experiment import Experiment  # noqa: PLC0415 (see ``check_study``)

    cost_plan = CostPlan(Experiment(root), steps)
    rows = cost_plan.rows()
    write_csv(root / PLAN, table.frame(rows))
    notes = table.notes(rows, cost_plan.where, steps, cost_plan.processes, cost_plan.assumed)
    print(table.screen(rows, cost_plan.device.type == "cuda"), *notes, f"the same as CSV: {root / PLAN}", sep="\n")
    check_disk(total(rows), shutil.disk_usage(project(root)).free)


def run_study(root: Path) -> None:
    """`dvc repro`, one study at a time in a project; then the headline and the comparison with the committed verdicts."""
    check_study(root)
    with _alone(root) as lock:
        if not _in_git(root):  # a downloaded zip: DVC is told so in its local configuration
            subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], cwd=root, check=True)
        committed = _committed(root)
        # all data first: a folder that is missing is found before any teacher is trained
        for stages in _stages(root):
            # dvc inherits the lock: when this process alone is killed, the next one waits for the dvc that is still at work
            if subprocess.run([sys.executable, "-m", "dvc", "repro", *stages], cwd=root, check=False, pass_fds=[lock]).returncode:
                raise Refused("the study stopped, for the reason above; what is finished is kept, and the same command goes on from there")
        print(_report(root, committed))


def _stages(root: Path) -> list[list[str]]:
    """What to ask `dvc repro` for, one call after the other; an empty list is everything.

    Where study.missing is blank, data sets whose path is an environment variable that is not set are left out, with what needs them; if
    that is all of them, none is, and the first is refused.
    """
    from kdlib.data.paths import resolve_path  # noqa: PLC0415 (see ``check_study``)

    params, kept = config.load(root), []
    for name, item in params.data.items():
        with suppress(Refused):
            if hasattr(item, "path"):
                resolve_path("", item.path)
            kept.append(name)
    unset = sorted(params.data.keys() - set(kept))
    if not unset or not kept or params.study.missing != "blank":
        return [["data"], []]
    print(f"leaves out {', '.join(unset)}, with what needs it: the path is an environment variable that is not set", file=sys.stderr)
    teachers = [f"teacher@{name}" for name, item in params.teachers.items() if item.data in kept]
    comparisons = [f"distill@{name}" for name, item in params.comparisons.items() if item.data in kept]
    return [[f"data@{name}" for name in kept], teachers + comparisons, ["--single-item", "notebook@4_tables", "tables", "readme"]]


def join_study(root: Path) -> None:
    """Train what the first machine trains, where study.launch names several: in the same folder, but for locks and files of DVC."""
    from kdlib.parallel import launch  # noqa: PLC0415
    from kdlib.study.training.experiment import Experiment  # noqa: PLC0415 (see ``check_study``)

    launch.join(Experiment(root).placement.launch)


def submit_study(root: Path, given: argparse.Namespace) -> None:
    """Put the study into Slurm's queue, after what can be checked away from its machines. Raises ``Refused``."""
    from kdlib.study.training.checks import check_shares, check_without_data  # noqa: PLC0415 (see ``check_study``)

    try:
        from kdlib.study.cli import slurm  # noqa: PLC0415 (optional)
    except ModuleNotFoundError as error:
        raise Refused(f'{error.name}: found no such package; allowed: submitit and what it needs; `pip install -e ".[slurm]"`') from error
    params = config.load(root)
    check_shares(params)
    check_without_data(params)
    print(slurm.submit_job(root, slurm.Asked(given.hours, given.partition, given.gpus, given.cores, given.sbatch)))


@contextmanager
def _alone(root: Path) -> Iterator[int]:
    """Wait until no other study runs in this project. Gives the descriptor of the lock, which a child process can hold on to."""
    state = project(root) / ".state"
    state.mkdir(exist_ok=True)
    with (state / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another study runs in this project: waiting for it to end", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def readme(root: Path) -> None:
    """Put results/headline.md between README's markers."""
    path = root / "README.md"
    text = path.read_text("utf-8")
    filled = insert_between_markers(text, (root / "results" / "headline.md").read_text("utf-8").strip(), "results")
    if filled != text:
        write_text(path, filled)


def gc(root: Path, free: bool) -> None:
    """Show what the run store and the DVC cache hold; free what no runs/ of the project uses."""
    store = Store(beside_dvc_cache(root))
    sizes, used = store.sizes(), _used(root)
    unused = [name for name in sizes if name not in used]
    print(f"run store   {store.folder}: {len(sizes)} runs, {sum(sizes.values()) / 1e6:.1f} MB")
    print(f"            not used by any runs/: {len(unused)} runs, {sum(sizes[name] for name in unused) / 1e6:.1f} MB")
    answers = beside_dvc_cache(root, ANSWERS)
    print(f"answers     {answers}: {folder_bytes(answers) / 1e6:.1f} MB that teachers can be asked for again")
    print(f"DVC cache   {dvc_cache(root)}: {folder_bytes(dvc_cache(root)) / 1e6:.1f} MB")
    if not free:
        what = "unused runs, all teachers' answers, and what DVC caches for neither the workspace nor a commit"
        print(f"nothing was deleted: `make gc FREE=1` deletes {what}")
        return
    with _alone(root):  # a run is finished a moment before runs/ has it
        used = _used(root)
        freed = sum(bytes_ for name, bytes_ in store.sizes().items() if name not in used and store.remove(name))
        kept = folder_bytes(answers)
        shutil.rmtree(answers, ignore_errors=True)  # who trains at this moment writes them anew
        print(f"freed {freed / 1e6:.1f} MB of the run store, {kept / 1e6:.1f} MB of answers", flush=True)
        subprocess.run([sys.executable, "-m", "dvc", "gc", "--workspace", "--all-commits", "--force"], cwd=root, check=False)


def compare(committed: pd.DataFrame, measured: pd.DataFrame) -> tuple[int, list[str]]:
    """How many of the committed verdicts were reproduced, and one line for each that was not. Frames as ``verdict_table`` gives them."""
    keys = ["question", "comparison", "method", "baseline"]
    joined = committed.merge(measured, on=keys, how="left", suffixes=("", "_here"))
    rows = joined.fillna({"verdict_here": "not measured"}).to_dict("records")
    others = [row for row in rows if row["verdict"] != row["verdict_here"]]
    lines = [f"  {' '.join(row[key] for key in keys)}: committed {row['verdict']}, here {row['verdict_here']}" for row in others]
    return len(rows) - len(others), lines


def _report(root: Path, committed: str | None) -> str:
    headline = (root / "results" / "headline.md").read_text("utf-8").strip()
    here = root.relative_to(Path.cwd()) if root.is_relative_to(Path.cwd()) else root
    places = f"Tables: {here / 'results/tables'}   figures: {here / 'results/figures'}   every run: {here / 'results/runs.csv'}"
    lines = ["", headline, "", f"{places}   executed notebooks: {here / 'runs/notebooks'}"]
    if committed is None:
        return "\n".join([*lines, "No committed verdicts to compare with."])
    before, after = (pd.read_csv(source) for source in (io.StringIO(committed), root / VERDICTS))
    same, others = compare(before, after)
    return "\n".join([*lines, f"This machine reproduced {same} of the {len(before)} committed verdicts{':' if others else '.'}", *others])


def _committed(root: Path) -> str | None:
    """verdicts.csv of the last commit; without git the one that came with the files, kept aside before the first run replaces it."""
    if _in_git(root):
        shown = subprocess.run(["git", "show", f"HEAD:./{VERDICTS}"], cwd=root, check=False, capture_output=True, text=True)
        return shown.stdout if shown.returncode == 0 else None
    if not (root / SHIPPED).is_file() and (root / VERDICTS).is_file():
        write_text(root / SHIPPED, (root / VERDICTS).read_text("utf-8"))
    return (root / SHIPPED).read_text("utf-8") if (root / SHIPPED).is_file() else None


def _in_git(root: Path) -> bool:
    command = ["git", "rev-parse"]
    return shutil.which("git") is not None and subprocess.run(command, cwd=root, check=False, capture_output=True).returncode == 0


def _studies(root: Path) -> list[Path]:
    """The folders of all studies of the project, the default one first."""
    home = project(root)
    return [home, *sorted(path.parent for path in (home / STUDIES).glob(f"*/{FILE}"))]


def _used(root: Path) -> set[str]:
    """Fingerprints of the runs that the runs/ of the project's studies were filled from."""
    paths = [path for folder in _studies(root) for place in (DISTILL, TEACHERS) for path in (folder / place).rglob("run.json")]
    return {read_json(path)["fingerprint"] for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "join", "submit", "check", "plan", "readme"):
        commands.add_parser(name).add_argument("study", nargs="?")
    commands.choices["plan"].add_argument("--steps", type=int, choices=range(1001), metavar="N", default=5)
    job = commands.choices["submit"]
    job.add_argument("--hours", type=float, required=True, metavar="H", help="at a time; a job that used them up goes on in another turn")
    job.add_argument("--partition", metavar="P", help="without it Slurm's default")
    job.add_argument("--gpus", type=int, default=0, metavar="N", help="on each machine: as many as study.launch.processes; without it none")
    job.add_argument("--cores", type=int, metavar="N", help="on each machine; without it one for each process")
    job.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="another option of sbatch, such as account=abc")
    commands.add_parser("gc").add_argument("--free", action="store_true")
    given = parser.parse_args()
    with refusals_in_one_line():
        if given.command == "gc":
            gc(config.find_root(), given.free)
        elif given.command == "plan":
            plan(find_study(given.study), given.steps)
        elif given.command == "submit":
            submit_study(find_study(given.study), given)
        else:
            {"run": run_study, "join": join_study, "check": check_study, "readme": readme}[given.command](find_study(given.study))


if __name__ == "__main__":
    main()
