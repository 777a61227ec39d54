"""Which files a reader opens who follows one batch from params.yaml to the first step of an optimiser, and how often he comes back.

    python benchmarks/walk.py

The reader wants to see every file of kdlib that takes part, once each, in the order in which the program enters them. To get to the next
one he needs the file that calls into it. If that is the one that he has just read he goes on; if not he comes back to it: a return. So a
function that calls into many files one after the other costs many returns, and a chain of calls from file to file costs none.

A file is entered when one of its functions is called; to import it does not count, nor does the constructor that a dataclass gets. All is
traced from the opening of a study to its first step: plain KD at one seed, of a teacher whose data and weights are there already.
"""

import inspect
import sys
import tempfile
from pathlib import Path
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from ruamel.yaml import YAML
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kdlib.study.training.experiment import Experiment

PACKAGE = Experiment.__module__.partition(".")[0]
FOLDER = Path(str(sys.modules[PACKAGE].__file__)).parent
PARAMS = Path(__file__).parents[1] / "params.yaml"
METHODS = ["kd"]
Call = tuple[str, str, str | None]  # file, function, and the file of the package that calls it; None: whoever stands outside
NAME = "walk"  # of everything in the study that needs a name


def write_study(root: Path) -> None:
    """Write a params.yaml of the digits, one teacher and one comparison, cut out of the project's own."""
    found = YAML(typ="safe", pure=True).load(PARAMS)
    user = {"data": NAME, "recipe": NAME}
    study = {
        "study": found["study"] | {"seeds": [0], "baseline": METHODS[0], "challengers": METHODS[1:]},
        "data": {NAME: found["data"]["digits"]},
        "teachers": {NAME: found["teachers"]["digits"] | user | {"model": "kd_resnet8_w8_s1", "min_top1": 0.0}},
        "recipes": {NAME: found["recipes"]["digits_weak"] | {"epochs": 1}},
        "methods": {name: found["methods"][name] for name in METHODS},
        "comparisons": {NAME: found["comparisons"]["digits_large"] | user | {"teacher": NAME, "methods": METHODS}},
    }
    study["study"] |= {"headline": {"data": NAME, "recipes": [NAME]}, "compute": found["study"]["compute"] | {"ahead": False}}
    YAML(typ="safe", pure=True).dump(study, root / PARAMS.name)


def traced() -> list[Call]:
    """Every call of one step and of the way to it, in order. Numbers of threads and the profiler of this process are changed."""
    torch.set_num_threads(1)  # with more cores the seeds would be trained in other processes
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (file := _file(frame)):
            caller = next((above for frame_above, _ in walk_stack(frame.f_back) if (above := _file(frame_above))), None)
            calls.append((file, frame.f_code.co_qualname, caller))

    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder))
        Experiment(Path(folder)).prepare_data(NAME)
        Experiment(Path(folder)).make_teacher(NAME)
        sys.setprofile(note)
        study = Experiment(Path(folder))
        hook = register_optimizer_step_pre_hook(lambda *_: sys.setprofile(None))  # not sooner: opening a study may try an optimiser
        study.distill(NAME)
        hook.remove()
    return calls


def _file(frame: FrameType) -> str | None:
    """The file of the package that a function is from; None for any other, and for the bodies of modules and classes."""
    file = Path(frame.f_code.co_filename)
    wanted = file.is_relative_to(FOLDER) and frame.f_code.co_flags & inspect.CO_OPTIMIZED
    return str(file.relative_to(FOLDER)) if wanted else None


def path(calls: list[Call]) -> list[str]:
    """The files in the order in which they are read; every file that is in it for a second or a further time is a return."""
    read: list[str] = []
    for file, _, caller in calls:
        if file not in read:
            read += [file] if caller in (None, *read[-1:]) else [str(caller), file]
    return read


if __name__ == "__main__":
    calls = traced()
    read = path(calls)
    for place, file in enumerate(read):
        functions = dict.fromkeys(name for its_file, name, _ in calls if its_file == file and not name.endswith(">"))
        print(f"    back to {file}" if file in read[:place] else f"{file}: {', '.join(functions)}")
    print(f"{len(set(read))} files, {len(read) - len(set(read))} returns")
