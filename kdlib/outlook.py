"""What a study will cost, before anything is trained: its groups of runs tried for a few steps each, and what cannot fit refused."""

import functools
import io
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdlib import identity
from kdlib.checks import check_against_data
from kdlib.config import Comparison, Refused, Study, refuse
from kdlib.data.imagined import Facts, Shape, facts, imagined
from kdlib.data.mixing import mix_groups
from kdlib.data.splits import load
from kdlib.data.stream import ViewStream
from kdlib.experiment import DATA, PLAIN, Experiment
from kdlib.forecast import Cost, Forecast, Machine, Row, forecast, largest_group
from kdlib.losses import METHODS
from kdlib.models import build
from kdlib.plan import trials_of
from kdlib.train import trial
from kdlib.train.learner import total_steps
from kdlib.train.run import Setting
from kdlib.train.schedule import Schedule
from kdlib.train.teacher import Teacher
from kdlib.train.threads import threads
from kdlib.train.workers import side_by_side


@dataclass(frozen=True)
class Kind:
    """A group of runs that train together, as far as it tells what they cost; by params.yaml's names."""

    data: str
    teacher: str | None
    student: str
    size: int | None  # pixels that the student looks at; None: as the data set has them
    recipe: str
    methods: tuple[str, ...]
    threads: int


Group = tuple[Kind, int]  # with its seed
Runs = set[tuple[object, ...]]  # each by what tells it from others (as kdlib.identity does, when data and weights are there)


@dataclass(frozen=True)
class Work:
    """What a teacher or a comparison trains."""

    of: Kind  # without methods: what all of its groups have in common
    stages: list[list[Group]]  # one after the other; the groups of one share out the machine
    shared: int = 0  # runs that are left out, since an earlier comparison makes them

    @property
    def runs(self) -> int:
        return sum(len(kind.methods) for stage in self.stages for kind, _ in stage)


def distilling(experiment: Experiment, name: str, planned: Runs) -> Work:
    """What ``Experiment.distill`` trains, in its order, but for runs that are ``planned`` already, to which these are added.

    Those of a sweep are not compared: which parameters it will choose is not known.
    """
    study, comparison = experiment.study, experiment.study.comparisons[name]
    sweep = comparison.sweep
    asked = [([variant.method for variant in trials_of(comparison, study)], [sweep.seed])] if sweep else []
    asked.append(([*comparison.methods, *(sweep.grids if sweep else ())], study.study.seeds))
    kind = Kind(comparison.data, comparison.teacher, comparison.student, None, comparison.recipe, (), 1)
    made = Work(kind, [_stage(experiment.schedule, kind, methods, seeds) for methods, seeds in asked if methods])
    if sweep:
        return made
    left = Work(kind, [_unplanned(study, comparison, stage, planned) for stage in made.stages])
    return replace(left, shared=made.runs - left.runs)


def _unplanned(study: Study, comparison: Comparison, stage: list[Group], planned: Runs) -> list[Group]:
    """One comparison's run may be another's too, which then takes it from the store."""
    left = []
    recipe, fixed = study.recipes[comparison.recipe].model_dump_json(), comparison.subset_seed
    for kind, seed in stage:
        drawn = None if comparison.fraction == 1 else (comparison.fraction, seed if fixed is None else fixed)
        keys = {method: (kind.data, drawn, kind.teacher, kind.student, recipe, method, seed) for method in kind.methods}
        methods = tuple(method for method in kind.methods if keys[method] not in planned)
        planned |= set(keys.values())
        left += [(replace(kind, methods=methods), seed)] if methods else []
    return left


def _stage(schedule: Schedule, kind: Kind, methods: list[str], seeds: list[int]) -> list[Group]:
    groups = schedule.groups(methods, seeds)
    its = _threads(schedule, len(groups))
    return [(replace(kind, methods=tuple(share), threads=its), seed) for share, seed in groups]


def teaching(experiment: Experiment, name: str) -> Work:
    """What ``Experiment.make_teacher`` trains."""
    params = experiment.study.teachers[name]
    kind = Kind(params.data, None, params.model, params.size, params.recipe, (), _threads(experiment.schedule, 1))
    return Work(kind, [[(replace(kind, methods=(PLAIN,)), params.seed)]])


def _threads(schedule: Schedule, groups: int) -> int:
    """Torch's, of a process that trains one of so many groups."""
    if schedule.cores > 1:
        return schedule.cores // min(schedule.cores, groups)
    return max(1, torch.get_num_threads() // schedule.launch.processes)


class Outlook:
    """Of an experiment's study. ``steps``: that each kind of group is tried for; with 0 nothing is timed, and memory stays unknown."""

    def __init__(self, experiment: Experiment, steps: int) -> None:
        self.study, self.steps, self.device, self.cores = experiment.study, steps, experiment.device, experiment.schedule.cores
        launch = self.study.study.launch
        self.machine = Machine(self.cores, launch.processes * launch.nodes)
        found = {name: facts(name, params, experiment.root / DATA / name) for name, params in self.study.data.items()}
        self.facts = {name: one for name, one in found.items() if one}
        listed = [name for name, one in self.facts.items() if self.study.data[name].source == "originals" and not one.assumed]
        self.listed = {name: load(experiment.root / DATA / name) for name in listed}
        for one in self.facts.values():
            check_against_data(self.study, imagined(one))
        self.work = {f"teachers.{name}": teaching(experiment, name) for name, item in self.study.teachers.items() if not item.checkpoint}
        planned: Runs = set()
        self.work |= {f"comparisons.{name}": distilling(experiment, name, planned) for name in self.study.comparisons}

    @property
    def assumed(self) -> list[str]:
        """Data sets whose images nobody has counted yet, and which are taken to be ImageNet."""
        return [name for name, one in self.facts.items() if one.assumed]

    @property
    def where(self) -> str:
        """The device, in words."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"this CPU, {self.cores} side by side" if self.cores > 1 else "this CPU"

    def rows(self) -> list[Row]:
        """The teachers that are to be trained, then the comparisons. Raises ``Refused`` for the first that memory is too small for."""
        users: dict[Kind, str] = {}  # of each kind whose data are known the first
        for key, its in self.work.items():
            for kind in (kind for stage in its.stages for kind, _ in stage if kind.data in self.facts):
                users.setdefault(kind, key)
        costs = self._costs(list(users))
        if self.steps:
            for kind, key in users.items():
                self._check_memory(kind, costs[kind], key)
        kept: dict[object, int] = {}
        return [self._row(key, costs, kept) for key in self.work]

    def _costs(self, kinds: list[Kind]) -> dict[Kind, Cost]:
        """Tried side by side, as they will be trained."""
        of = functools.partial(_cost, self.study, self.facts, self.device, (self.steps, self.machine.together))
        costs: dict[Kind, Cost] = {}
        print(f"tries {len(kinds)} groups of runs, of the largest nets some seconds each", file=sys.stderr, flush=True)
        for count in sorted({kind.threads for kind in kinds}):
            alike = [kind for kind in kinds if kind.threads == count]
            told = [(f"{len(costs) + place} of {len(kinds)}", kind) for place, kind in enumerate(alike, start=1)]
            costs |= dict(zip(alike, side_by_side(functools.partial(_told, of), told, self._beside(count)), strict=True))
        return {kind: self._decoded(kind, cost) for kind, cost in costs.items()}

    def _decoded(self, kind: Kind, cost: Cost) -> Cost:
        """With the time in which its images are decoded: beside what a GPU does, but by the cores that a CPU would train with."""
        if cost.seconds is None or kind.data not in self.listed:
            return cost
        seconds = self._decoding(kind.data, kind.recipe)
        together = cost.seconds + seconds if self.device.type == "cpu" else max(cost.seconds, seconds)
        return replace(cost, seconds=together, decoding=seconds / cost.seconds)

    @functools.cache  # noqa: B019 (as long as the command)
    def _decoding(self, data: str, recipe: str) -> float:
        found, its = self.listed[data], self.study.recipes[recipe]
        every = np.arange(len(found.train.labels))
        images, labels = found.train.images, found.train.labels
        stream = ViewStream(images, labels, every, classes=found.classes, recipe=its, hflip=found.hflip, seed=0)
        return trial.decoding(stream, self.study.study.launch.processes, self.study.study.launch.nodes)

    def _beside(self, count: int) -> int:
        """Processes of so many threads that train at once."""
        return max(1, self.cores // count)

    def _check_memory(self, kind: Kind, cost: Cost, user: str) -> None:
        recipe, room = self.study.recipes[kind.recipe], trial.room(self.device) // self._beside(kind.threads)
        if cost.peak_bytes is not None and cost.peak_bytes <= room:
            return
        setting, methods = _setting(self.study, self.facts[kind.data], self.device, kind)

        def peak(size: int) -> int | None:
            smaller = replace(setting, recipe=recipe.model_copy(update={"group_size": size}))
            with threads(kind.threads), redirect_stdout(io.StringIO()):
                return trial.memory(smaller, methods, cost)

        raise too_large(kind, user, recipe.batch_size // mix_groups(recipe), cost.peak_bytes, room, peak)

    def _row(self, key: str, costs: Mapping[Kind, Cost], kept: dict[object, int]) -> Row:
        its, (section, name) = self.work[key], key.split(".")
        about = section.removesuffix("s"), name, its.of.data, its.of.student, its.of.teacher, its.of.recipe
        if its.of.data not in self.facts:
            return Row(*about, Forecast(its.runs), shared=its.shared)
        recipe = self.study.recipes[its.of.recipe]
        steps = total_steps(recipe, self.facts[its.of.data].train_images)
        answers, live = self._answers(name, costs, steps, kept) if its.of.teacher else (0, 0)
        found = [[costs[kind] for kind, _ in stage] for stage in its.stages]
        return Row(*about, forecast(found, steps * recipe.batch_size, self.machine, answers), live, its.shared)

    def _answers(self, name: str, costs: Mapping[Kind, Cost], steps: int, kept: dict[object, int]) -> tuple[int, int]:
        """Bytes of teachers' answers that a comparison adds to those that are kept, of the same views once; and of those to one seed's
        views where they are too many."""
        comparison, most = self.study.comparisons[name], round(1e9 * self.study.study.answers_gb)
        views = json.dumps(identity.of_views(self.study.recipes[comparison.recipe]), sort_keys=True)
        added = live = 0
        for kind, seed in (group for stage in self.work[f"comparisons.{name}"].stages for group in stage):
            size, to = steps * costs[kind].answers_bytes, (comparison.data, comparison.fraction, comparison.teacher, views, seed)
            if size > most:
                live = max(live, size)
            elif size > kept.get(to, 0):
                added += size - kept.get(to, 0)
                kept[to] = size
        return added, live


def too_large(kind: Kind, user: str, group: int, needed: int | None, room: int, peak: Callable[[int], int | None]) -> Refused:
    """About a mix group that does not fit into ``room`` bytes; names the largest that does. ``needed``: None where it could not be told."""
    fits = largest_group(peak, group // 2, room) if group % 2 == 0 else None
    found = f"{group} images, for which {user} takes {'' if needed is None else f'{needed / 1e9:.3g} GB, '}more than there is"
    of = f"the {room / 1e9:.3g} GB of memory that a process has here"
    if fits is None:
        do = f"train fewer methods at once, or a smaller student: {kind.student} with {len(kind.methods)} methods does not fit"
        return refuse(f"recipes.{kind.recipe}.group_size", found, f"what fits into {of}, and no group does", do)
    do = "set it to that (it changes which images are mixed and normalised together), train fewer methods at once, or use larger GPUs"
    return refuse(f"recipes.{kind.recipe}.group_size", found, f"at most {fits}, which fits into {of}", do)


def check_disk(of: Forecast, free: int) -> None:
    """Raises ``Refused`` if all that is written together does not fit into so many bytes."""
    parts = {"weights": of.weights_bytes, "checkpoints": of.checkpoint_bytes, "teachers' answers": of.answers_bytes}
    needed, answers = sum(size or 0 for size in parts.values()), of.answers_bytes or 0
    if needed <= free:
        return
    told = ", ".join(f"{what} {(size or 0) / 1e9:.3g} GB" for what, size in parts.items())
    found, allowed = f"{told}: {needed / 1e9:.3g} GB", f"at most the {free / 1e9:.3g} GB that are free"
    if needed - answers <= free:
        raise refuse("study.answers_gb", found, allowed, "set it to 0, and the teacher is asked each time, or free some")
    raise refuse("study.seeds", found, allowed, "name fewer of them, or fewer methods in comparisons, or free some")


def _cost(study: Study, known: Mapping[str, Facts], device: torch.device, of: tuple[int, int], kind: Kind) -> Cost:
    """From (steps, processes). Keeps from the log what the engine says, which is not about a real training."""
    with threads(kind.threads), redirect_stdout(io.StringIO()):
        return trial.cost(*_setting(study, known[kind.data], device, kind), *of)


def _told(of: Callable[[Kind], Cost], item: tuple[str, Kind]) -> Cost:
    """A cost, said to be worked on: by whichever process does it."""
    place, kind = item
    whose = f"{kind.student} of {kind.teacher}" if kind.teacher else kind.student
    print(f"  {place}: {whose}, {kind.recipe}, {len(kind.methods)} at once", file=sys.stderr, flush=True)
    return of(kind)


@functools.lru_cache(maxsize=1)  # a large one takes seconds to make, and most groups in turn have the same
def _untrained(model: str, shape: Shape, device: torch.device) -> Teacher:
    return Teacher(build(model, *shape).to(device))


def _setting(study: Study, of: Facts, device: torch.device, kind: Kind) -> tuple[Setting, trial.Methods]:
    data, teacher = imagined(of), None
    if kind.teacher:
        taught = study.teachers[kind.teacher]
        teacher = _untrained(taught.model, (data.classes, data.channels, taught.size or data.size), device)
    parameters = study.methods if kind.teacher else {PLAIN: {"hard_weight": 1.0}}
    # all training images, whatever the fraction: a method that keeps something of each takes the most
    index, recipe = np.arange(of.train_images), study.recipes[kind.recipe]
    setting = Setting(data, index, kind.student, kind.size or data.size, teacher, recipe, 0, device, "trial", study.study.compute)
    return setting, {f"{name} {i}": functools.partial(METHODS[name], **parameters[name]) for i, name in enumerate(kind.methods)}
