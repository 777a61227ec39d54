"""Runs one notebook as one pipeline stage: the only file that DVC calls.

python -m kdlib.study.cli.notebook clean SOURCE COPY      a code-only copy: saving a notebook in JupyterLab reruns nothing
python -m kdlib.study.cli.notebook run STAGE[@NAME]       execute the stage's notebook, as dvc.yaml describes the stage
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from ruamel.yaml import YAML

from kdlib import config
from kdlib.errors import Refused, known, refuse_full_disk
from kdlib.files import write_text
from kdlib.parallel.signals import SIGNALS, to_log
from kdlib.study.cli import refusals_in_one_line

SECONDS_TO_SAVE = 8  # of the ten that clusters give at least
LOOK_SECONDS, BUSY = 0.3, 30.0  # at what others do, and from how many percent of the cores on it counts
LIVE = Path(".state/live")  # notebooks while they run, and those that failed
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, with its ``${key}`` and ``${item.x}`` filled in."""

    title: str  # stage or stage@name
    name: str  # the item of a foreach stage, or ""
    notebook: Path
    executed: Path  # where the executed notebook goes: an output that nothing depends on, since no two executions are alike
    deps: list[str]
    params: list[str]


def describe(root: Path, title: str) -> Stage:
    """Read a stage from dvc.yaml. Raises ``Refused`` for a stage that is not there."""
    kind, _, name = title.partition("@")
    stages = YAML(typ="safe", pure=True).load((root / "dvc.yaml").read_text("utf-8"))["stages"]
    if kind not in stages:
        raise Refused(f"dvc.yaml: found no stage {kind!r}; allowed: {', '.join(stages)}; choose one of them")
    body, values = stages[kind], {"key": name}

    def filled(text: str) -> str:
        return re.sub(r"\$\{([\w.]+)\}", lambda match: values[match[1]], text)

    if "do" in body:
        items = config.read_yaml(root)[re.fullmatch(r"\$\{(\w+)\}", body["foreach"])[1]]  # type: ignore[index]
        item = items[known(kind, name, items)]
        values |= {f"item.{field}": value for field, value in item.items() if isinstance(value, str)}
        body = body["do"]
    deps, params = ([filled(text) for text in body.get(part, [])] for part in ("deps", "params"))
    outs = [filled(next(iter(out)) if isinstance(out, dict) else out) for out in body["outs"]]
    notebook, executed = (Path(next(path for path in paths if path.endswith(".ipynb"))) for paths in (deps, outs))
    return Stage(title, name, notebook, executed, deps, params)


def clean(source: Path, copy: Path) -> None:
    """Copy a notebook without outputs, counts and metadata that an editor changes."""
    write_text(copy, _repeatable(source, outputs=False))


def run_stage(root: Path, title: str) -> None:
    """Execute a stage's notebook with papermill; keep the executed notebook, without what differs from run to run.

    Raises ``Refused`` when the stage's notebook refuses something, and when code or parameters changed meanwhile: DVC would
    record the new ones as what this result was made from (treeverse/dvc#11058).
    """
    stage = describe(root, title)
    config.load(root)
    before = _inputs(root, stage)
    live = root / LIVE / f"{title.replace('@', '.')}.ipynb"
    live.parent.mkdir(parents=True, exist_ok=True)
    _execute(root / stage.notebook, live, stage)
    if _inputs(root, stage) != before:
        raise Refused(f"{title}: code or parameters changed while it ran, so this result is not recorded; run `dvc repro` again")
    write_text(root / stage.executed, _repeatable(live, outputs=True))
    live.unlink()


def _execute(notebook: Path, live: Path, stage: Stage) -> None:
    # jsonschema imports it for grammars that nobody here uses: 2 s per stage (python-jsonschema/jsonschema#1428)
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill  # noqa: PLC0415 (dvc's other commands of this file do without it)

    kept = "what was saved last is kept, and the same command goes on from there"
    _share_cores()
    for number in SIGNALS:
        signal.signal(number, _stop_kernel)
    to_log()
    kernel = {
        "kernel_name": "python3",
        "extra_arguments": [
            "--IPKernelApp.log_level=CRITICAL",  # it warns of its sockets and reports the end of the run as an error
            "--IPKernelApp.capture_fd_output=False",  # what its child processes print would be shown twice
        ],
        "shutdown_kernel": "immediate",  # its files are whole when its last cell ends; taking torch apart would cost 1 s per stage
    }
    shown = {"progress_bar": False, "log_output": True, "stdout_file": sys.stdout, "stderr_file": sys.stderr}
    try:
        papermill.execute_notebook(str(notebook), str(live), {"name": stage.name} if stage.name else {}, **kernel, **shown)
    except RuntimeError as error:  # so says nbclient, and jupyter_client until a kernel has begun, that it died
        if {signal.getsignal(number) for number in SIGNALS} != {_stop_kernel}:  # a cluster asks all processes at once to stop
            print(f"{stage.title}: stopped; {kept}", file=sys.stderr, flush=True)
            raise KeyboardInterrupt from None
        raise Refused(f"{stage.title}: its process was ended ({error}), perhaps for want of memory; {kept}") from None
    except papermill.PapermillExecutionError as error:
        if error.ename in ("Stopped", "KeyboardInterrupt"):
            print(error.evalue or f"{stage.title}: stopped; {kept}", file=sys.stderr, flush=True)
            raise KeyboardInterrupt from None
        if error.ename in ("Refused", "Diverged"):
            raise Refused(error.evalue) from None
        where = live.relative_to(Path.cwd()) if live.is_relative_to(Path.cwd()) else live
        what = f"cell {error.exec_count} failed with {error.ename}: {error.evalue}"
        raise Refused(f"{stage.title}: {what} (the notebook as far as it came: {where})") from None


def _share_cores() -> None:
    """Where others use the cores, let threads that wait sleep: kernels inherit it. Spinning they take a core from the one they wait for.

    A teacher's step on two cores, measured: sleeping takes 1.5 times as long if they are idle, a half if one is busy, a 14th if both are.
    """
    if psutil.cpu_percent(LOOK_SECONDS) > BUSY:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _stop_kernel(number: int, _: FrameType | None) -> None:
    """Pass a signal on to the kernel, which is not in the terminal's group of processes, and which DVC does not know; then wait for it to
    save. Asked again, or after a while, it is ended as it stands: its files are whole, and what it saved last is kept. SIGTERM may come
    again at once: Slurm sends it several times.
    """
    signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else signal.default_int_handler)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(SECONDS_TO_SAVE)
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGINT)


def _inputs(root: Path, stage: Stage) -> str:
    """Hash of the files and parameters that dvc.yaml names for a stage; data of earlier stages are DVC's to watch."""
    digest = hashlib.sha256()
    for dep in stage.deps:
        if not dep.startswith("runs/"):
            for file in sorted((root / dep).rglob("*.py")) if (root / dep).is_dir() else [root / dep]:
                digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    content = config.read_yaml(root)
    for key in stage.params:
        value: Any = content
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
        digest.update(f"{key}\0{json.dumps(value, sort_keys=True)}\0".encode())
    return digest.hexdigest()


def _repeatable(path: Path, outputs: bool) -> str:
    """What repeats of a notebook: equal work gives equal bytes."""
    notebook = json.loads(path.read_text("utf-8"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook |= {"metadata": {"kernelspec": kernel, "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    for i, cell in enumerate(notebook["cells"]):
        tags = cell["metadata"].get("tags")
        cell["id"], cell["source"], cell["metadata"] = f"cell-{i}", "".join(cell["source"]), {"tags": tags} if tags else {}
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = [_stripped(output) for output in cell["outputs"] if output.get("name") != "stderr"] if outputs else []
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _stripped(output: dict[str, Any]) -> dict[str, Any]:
    output |= {key: empty for key, empty in (("execution_count", None), ("metadata", {})) if key in output}
    for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
        if key in holder:
            holder[key] = _ADDRESS.sub("", "".join(holder[key]))
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cleaning = commands.add_parser("clean")
    cleaning.add_argument("source", type=Path)
    cleaning.add_argument("copy", type=Path)
    commands.add_parser("run").add_argument("stage")
    given = parser.parse_args()
    with refusals_in_one_line():
        if given.command == "clean":
            clean(given.source, given.copy)
        else:
            with refuse_full_disk():  # papermill writes too
                run_stage(Path.cwd(), given.stage)


if __name__ == "__main__":
    main()
