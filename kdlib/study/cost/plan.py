"""What a study will cost, before anything is trained: its groups of runs tried for a few steps each, and what cannot fit refused."""

import functools
import io
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdlib.config.schema import Comparison, Params
from kdlib.data.dataset import load_dataset
from kdlib.data.sources import Shape
from kdlib.engine.backend import threads
from kdlib.engine.setting import Setting, total_steps
from kdlib.engine.teacher import Teacher
from kdlib.errors import Refused, refuse
from kdlib.losses import METHODS
from kdlib.models.build import build
from kdlib.parallel.placement import Placement
from kdlib.parallel.workers import side_by_side
from kdlib.study.cost import measure
from kdlib.study.cost.estimate import Cost, Row, estimated_row, largest_group
from kdlib.study.cost.synthetic_data import Facts, facts, imagined
from kdlib.study.training import identity
from kdlib.study.training.checks import check_against_data
from kdlib.study.training.experiment import PLAIN, Experiment
from kdlib.study.training.planned import DATA, trials_of
from kdlib.views.mixup import mix_groups
from kdlib.views.stream import ViewStream


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
Runs = set[tuple[object, ...]]  # each by what tells it from others (as kdlib.study.training.identity does, when data and weights are there)


@dataclass(frozen=True)
class Work:
    """What a teacher or a comparison trains."""

    of: Kind  # without methods: what all of its groups have in common
    stages: list[list[Group]]  # one after the other; the groups of one share out the machine
    shared: int = 0  # runs that are left out, since an earlier comparison makes them

    @property
    def groups(self) -> list[Group]:
        """Of all stages."""
        return [group for stage in self.stages for group in stage]

    @property
    def runs(self) -> int:
        return sum(len(kind.methods) for kind, _ in self.groups)


def distilling(experiment: Experiment, name: str, planned: Runs) -> Work:
    """What ``Experiment.distill`` trains, in its order, but for runs that are ``planned`` already, to which these are added.

    Those of a sweep are not compared: which parameters it will choose is not known.
    """
    params, comparison = experiment.params, experiment.params.comparisons[name]
    sweep = comparison.sweep
    asked = [([variant.method for variant in trials_of(comparison, params)], [sweep.seed])] if sweep else []
    asked.append(([*comparison.methods, *(sweep.grids if sweep else ())], params.study.seeds))
    kind = Kind(comparison.data, comparison.teacher, comparison.student, None, comparison.recipe, (), 1)
    whole = Work(kind, [_stage(experiment.placement, kind, methods, seeds) for methods, seeds in asked if methods])
    if sweep:
        return whole
    left = Work(kind, [_unplanned(params, comparison, stage, planned) for stage in whole.stages])
    return replace(left, shared=whole.runs - left.runs)


def _unplanned(params: Params, comparison: Comparison, stage: list[Group], planned: Runs) -> list[Group]:
    """One comparison's run may be another's too, which then takes it from the store."""
    left = []
    recipe, fixed = params.recipes[comparison.recipe].model_dump_json(), comparison.subset_seed
    for kind, seed in stage:
        drawn = None if comparison.fraction == 1 else (comparison.fraction, seed if fixed is None else fixed)
        keys = {method: (kind.data, drawn, kind.teacher, kind.student, recipe, method, seed) for method in kind.methods}
        methods = tuple(method for method in kind.methods if keys[method] not in planned)
        planned |= set(keys.values())
        left += [(replace(kind, methods=methods), seed)] if methods else []
    return left


def _stage(placement: Placement, kind: Kind, methods: list[str], seeds: list[int]) -> list[Group]:
    groups = placement.groups(methods, seeds)
    return [(replace(kind, methods=tuple(share), threads=_threads(placement, len(groups))), seed) for share, seed in groups]


def teaching(experiment: Experiment, name: str) -> Work:
    """What ``Experiment.make_teacher`` trains."""
    teacher = experiment.params.teachers[name]
    kind = Kind(teacher.data, None, teacher.model, teacher.size, teacher.recipe, (), _threads(experiment.placement, 1))
    return Work(kind, [[(replace(kind, methods=(PLAIN,)), teacher.seed)]])


def _threads(placement: Placement, groups: int) -> int:
    """Torch's, of a process that trains one of so many groups."""
    if placement.cores > 1:
        return placement.cores // min(placement.cores, groups)
    return max(1, torch.get_num_threads() // placement.launch.processes)


class CostPlan:
    """Of an experiment's study. ``steps``: that each kind of group is tried for; with 0 nothing is timed, and memory stays unknown."""

    def __init__(self, experiment: Experiment, steps: int) -> None:
        self.params, self.steps, self.device, self.cores = experiment.params, steps, experiment.device, experiment.placement.cores
        cpu = f"this CPU, {self.cores} side by side" if self.cores > 1 else "this CPU"
        self.where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu  # in words
        self.processes = self.params.study.launch.processes * self.params.study.launch.nodes  # that train one run together
        folders = {name: experiment.root / DATA / name for name in self.params.data}
        self.facts = {name: of for name, source in self.params.data.items() if (of := facts(name, source, folders[name]))}
        self.assumed = [name for name, of in self.facts.items() if of.assumed]  # nobody has counted their images yet
        listed = [name for name in self.facts if self.params.data[name].source == "originals" and name not in self.assumed]
        self.listed = {name: load_dataset(folders[name]) for name in listed}
        for of in self.facts.values():
            check_against_data(self.params, imagined(of))
        self.work = {f"teachers.{name}": teaching(experiment, name) for name, item in self.params.teachers.items() if not item.checkpoint}
        planned: Runs = set()
        self.work |= {f"comparisons.{name}": distilling(experiment, name, planned) for name in self.params.comparisons}

    def rows(self) -> list[Row]:
        """The teachers that are to be trained, then the comparisons. Raises ``Refused`` for the first that memory is too small for."""
        users: dict[Kind, str] = {}  # of each kind whose data are known the first
        for key, work in self.work.items():
            for kind, _ in work.groups:
                if kind.data in self.facts:
                    users.setdefault(kind, key)
        costs = self._costs(list(users))
        if self.steps:
            for kind, key in users.items():
                self._check_memory(kind, costs[kind], key)
        kept: dict[object, int] = {}
        return [self._row(key, costs, kept) for key in self.work]

    def _costs(self, kinds: list[Kind]) -> dict[Kind, Cost]:
        """Tried side by side, as they will be trained."""
        cost = functools.partial(_cost, self.params, self.facts, self.device, self.steps, self.processes)
        costs: dict[Kind, Cost] = {}
        print(f"tries {len(kinds)} groups of runs, of the largest nets some seconds each", file=sys.stderr, flush=True)
        for count in sorted({kind.threads for kind in kinds}):
            alike = [kind for kind in kinds if kind.threads == count]
            numbered = [(f"{number} of {len(kinds)}", kind) for number, kind in enumerate(alike, start=len(costs) + 1)]
            costs |= dict(zip(alike, side_by_side(cost, numbered, max(1, self.cores // count)), strict=True))
        return {kind: self._decoded(kind, cost) for kind, cost in costs.items()}

    def _decoded(self, kind: Kind, cost: Cost) -> Cost:
        """With the time in which its images are decoded: beside what a GPU does, but by the cores that a CPU would train with."""
        if math.isnan(cost.seconds) or kind.data not in self.listed:
            return cost
        seconds = self._decoding(kind.data, kind.recipe)
        together = cost.seconds + seconds if self.device.type == "cpu" else max(cost.seconds, seconds)
        return replace(cost, seconds=together, decoding=seconds / cost.seconds)

    @functools.cache  # noqa: B019 (as long as the command)
    def _decoding(self, name: str, recipe: str) -> float:
        data, launch = self.listed[name], self.params.study.launch
        train, index, recipe_params = data.train, np.arange(len(data.train.labels)), self.params.recipes[recipe]
        stream = ViewStream(train.images, train.labels, index, classes=data.classes, recipe=recipe_params, hflip=data.hflip, seed=0)
        return measure.decoding(stream, launch.processes, launch.nodes)

    def _check_memory(self, kind: Kind, cost: Cost, user: str) -> None:
        recipe, room = self.params.recipes[kind.recipe], measure.room(self.device) // max(1, self.cores // kind.threads)
        if cost.peak_bytes is not None and cost.peak_bytes <= room:
            return
        setting, methods = _setting(self.params, self.facts[kind.data], self.device, kind)

        def peak(size: int) -> int | None:
            smaller = replace(setting, recipe=recipe.model_copy(update={"group_size": size}))
            with threads(kind.threads), redirect_stdout(io.StringIO()):
                return measure.memory(smaller, methods, cost)

        raise too_large(kind, user, recipe.batch_size // mix_groups(recipe), cost.peak_bytes, room, peak)

    def _row(self, key: str, costs: Mapping[Kind, Cost], kept: dict[object, int]) -> Row:
        work, (section, name) = self.work[key], key.split(".")
        of = work.of
        row = Row(section.removesuffix("s"), name, of.data, of.student, of.teacher, of.recipe, work.runs, shared=work.shared)
        if of.data not in self.facts:
            return row
        recipe = self.params.recipes[of.recipe]
        steps = total_steps(recipe, self.facts[of.data].train_images)
        answers, live = self._answers(name, costs, steps, kept) if of.teacher else (0, 0)
        stages = [[costs[kind] for kind, _ in stage] for stage in work.stages]
        return replace(
            estimated_row(row, stages, steps * recipe.batch_size, self.cores, self.processes), answers_bytes=answers, live_bytes=live
        )

    def _answers(self, name: str, costs: Mapping[Kind, Cost], steps: int, kept: dict[object, int]) -> tuple[int, int]:
        """Bytes of teachers' answers that a comparison adds to those that are kept, of the same views once; and of those to one seed's
        views where they are too many."""
        comparison, most = self.params.comparisons[name], round(1e9 * self.params.study.answers_gb)
        views = json.dumps(identity.of_views(self.params.recipes[comparison.recipe]), sort_keys=True)
        added = live = 0
        for kind, seed in self.work[f"comparisons.{name}"].groups:
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


def check_disk(row: Row, free: int) -> None:
    """Raises ``Refused`` if all that is written together, as far as it is known, does not fit into so many bytes."""
    sizes = {"weights": row.weights_bytes, "checkpoints": row.checkpoint_bytes, "teachers' answers": row.answers_bytes}
    sizes = {what: 0 if math.isnan(size) else size for what, size in sizes.items()}
    needed = sum(sizes.values())
    if needed <= free:
        return
    found = f"{', '.join(f'{what} {size / 1e9:.3g} GB' for what, size in sizes.items())}: {needed / 1e9:.3g} GB"
    allowed = f"at most the {free / 1e9:.3g} GB that are free"
    if needed - sizes["teachers' answers"] <= free:
        raise refuse("study.answers_gb", found, allowed, "set it to 0, and the teacher is asked each time, or free some")
    raise refuse("study.seeds", found, allowed, "name fewer of them, or fewer methods in comparisons, or free some")


def _cost(params: Params, known: Mapping[str, Facts], device: torch.device, steps: int, processes: int, item: tuple[str, Kind]) -> Cost:
    """Say which one is tried, by whichever process does it; keep from the log what the engine says, which is about no real training."""
    number, kind = item
    whose = f"{kind.student} of {kind.teacher}" if kind.teacher else kind.student
    print(f"  {number}: {whose}, {kind.recipe}, {len(kind.methods)} at once", file=sys.stderr, flush=True)
    with threads(kind.threads), redirect_stdout(io.StringIO()):
        return measure.cost(*_setting(params, known[kind.data], device, kind), steps, processes)


@functools.lru_cache(maxsize=1)  # a large one takes seconds to make, and most groups in turn have the same
def _untrained(model: str, shape: Shape, device: torch.device) -> Teacher:
    return Teacher(build(model, *shape).to(device))


def _setting(params: Params, of: Facts, device: torch.device, kind: Kind) -> tuple[Setting, measure.Methods]:
    data, teacher = imagined(of), None
    if kind.teacher:
        taught = params.teachers[kind.teacher]
        teacher = _untrained(taught.model, (data.classes, data.channels, taught.size or data.size), device)
    parameters = params.methods if kind.teacher else {PLAIN: {"hard_weight": 1.0}}
    # all training images, whatever the fraction: a method that keeps something of each takes the most
    index, recipe = np.arange(of.train_images), params.recipes[kind.recipe]
    setting = Setting(data, index, kind.student, kind.size or data.size, teacher, recipe, 0, device, "trial", params.study.compute)
    return setting, {f"{name} {i}": functools.partial(METHODS[name], **parameters[name]) for i, name in enumerate(kind.methods)}
