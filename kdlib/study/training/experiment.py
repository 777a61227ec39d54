"""Assembles one stage of the study from its names. The library knows no data set, model, method or recipe by name; this does."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat, SupportsInt

import numpy as np
import torch
from safetensors.torch import load_file

from kdlib import config
from kdlib.config.schema import Comparison, Params
from kdlib.data.dataset import DataSet, load_dataset
from kdlib.data.sources import prepare
from kdlib.data.splits import Index, subset
from kdlib.engine.backend import threads
from kdlib.engine.learner import Job
from kdlib.engine.record import write_measured
from kdlib.engine.setting import Setting
from kdlib.engine.teacher import Teacher
from kdlib.engine.train import train
from kdlib.errors import known, refuse, refuse_full_disk
from kdlib.files import read_json, write_json
from kdlib.losses import METHODS, looks_at
from kdlib.models.build import Classifier, build
from kdlib.models.checkpoints import load_checkpoint
from kdlib.parallel.placement import Placement
from kdlib.parallel.ranks import from_rank_zero, rank, say, wait_for_all
from kdlib.study.training import checks, identity
from kdlib.study.training.planned import DATA, TEACHERS, TUNED, Variant, methods_of, run_folder, trials_of
from kdlib.study.training.store import ANSWERS, Store, beside_dvc_cache

PLAIN = next(name for name, method in METHODS.items() if not method.asks_teacher)  # how a teacher is trained
Group = tuple[Sequence[Variant], int]  # variants and a seed: trained together, they share batches and one teacher pass


class Diverged(RuntimeError):
    """A loss was not finite, and params.yaml says that this ends the study."""


@dataclass(frozen=True)
class Planned:
    """One run that the study needs, by name and by fingerprint."""

    variant: Variant
    seed: int
    fingerprint: str


class Experiment:
    """The study in a folder. Opening it checks params.yaml completely and reads nothing else.

    Raises ``Refused`` for the first thing in params.yaml that is wrong.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or config.find_root()
        self.params: Params = config.load(self.root)
        self.store = Store(beside_dvc_cache(self.root))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.placement = Placement.on(self.device, self.params.study.launch, Diverged)
        checks.check_without_data(self.params)
        checks.check_machines(self.placement.launch)
        checks.check_shares(self.params)

    def prepare_data(self, name: str) -> DataSet:
        """Write the folder of a data set."""
        key = known("data", name, self.params.data)
        return prepare(key, self.params.data[key], self.root / DATA / key)

    def data(self, name: str) -> DataSet:
        """Open the folder of a data set that the data stage has written."""
        return load_dataset(self.root / DATA / name)

    @refuse_full_disk()
    def make_teacher(self, name: str) -> dict[str, Any]:
        """Train or load a teacher and measure it. Returns its metrics. Raises ``Refused`` below the accuracy demanded of it."""
        teacher = self.params.teachers[known("teachers", name, self.params.teachers)]
        data = self.data(teacher.data)
        checks.check_against_data(self.params, data)
        folder = self.root / TEACHERS / name
        if teacher.checkpoint is None:
            folder_of_run = self.store.run(self.placement.run_together(functools.partial(self._train_teacher, name)).fingerprint)
        else:
            folder_of_run = self._import_checkpoint(name, data)
        metrics = read_json(folder_of_run / "metrics.json")
        if metrics["status"] != "finished":
            what = f"diverged at step {metrics['diverged_step']}"
            raise refuse(f"teachers.{name}", what, "a teacher whose loss stays finite", metrics["diverged_cause"])
        if (top1 := metrics["test_top1"]) < teacher.min_top1:
            allowed = f"at most the top-1 of {top1:.4f} that this teacher reaches on the test split"
            do = "train it longer or with more data, choose a stronger model, or demand less of it"
            raise refuse(f"teachers.{name}.min_top1", teacher.min_top1, allowed, do)
        write_json(folder / "run.json", {"teacher": name, **teacher.model_dump(), "fingerprint": folder_of_run.name})
        self.store.export(folder_of_run.name, folder)
        return metrics

    def teacher(self, name: str) -> tuple[Teacher, str]:
        """A teacher that the teacher stage has made, frozen, and what tells its answers from another's: its model and its weights."""
        teacher, path = self.params.teachers[name], self.root / TEACHERS / name / "weights.safetensors"
        if not path.is_file():
            raise refuse(f"teachers.{name}", "no weights", "a teacher that the teacher stage has made", f"run `dvc repro teacher@{name}`")
        return Teacher(self._trained(teacher.model, teacher.data, teacher.size, path)), identity.of_teacher(teacher, path)

    @refuse_full_disk()
    def distill(self, name: str) -> list[Path]:
        """Bring every run of a comparison to its end and put it below runs/distill/. Returns the folders.

        A finished run is taken from the store, an interrupted one goes on, anything else is trained; on a CPU the seeds side by side.
        """
        comparison = self.params.comparisons[known("comparisons", name, self.params.comparisons)]
        checks.check_against_data(self.params, self.data(comparison.data))
        folders = []
        if comparison.sweep:
            folders += self._finish(name, trials_of(comparison, self.params), [comparison.sweep.seed])
        return folders + self._finish(name, [*methods_of(comparison, self.params), *self._chosen(name)], self.params.study.seeds)

    @refuse_full_disk()
    def try_method(self, comparison: str, method: str, seed: SupportsInt, **parameters: SupportsFloat) -> Path:
        """Train one method of a comparison with some of its parameters changed; the folder of the run in the store.

        The same functions as the pipeline's; runs/ and results/ stay as they are, and the same call again costs nothing.
        """
        among = self.params.comparisons[known("comparisons", comparison, self.params.comparisons)]
        # typed as params.yaml's numbers are: 4 and 4.0, or a seed out of a table, must name one run
        changed = {name: float(value) for name, value in parameters.items()}
        variant = Variant(method, method, {**self.params.methods[known("method", method, self.params.methods)], **changed})
        checks.check_method(f"methods.{method}", method, variant.parameters)
        checks.check_against_data(self.params, self.data(among.data))
        variants = len(among.methods) + len(among.sweep.grids if among.sweep else ())
        with threads(self.placement.threads(variants, len(self.params.study.seeds))):  # as in its comparison
            (plan,) = self._run(comparison, ([variant], int(seed)))
        return self.store.run(plan.fingerprint)

    def student(self, comparison: str, folder: Path) -> Classifier:
        """A student with the final weights of a run of this comparison."""
        item = self.params.comparisons[comparison]
        return self._trained(item.student, item.data, None, folder / "weights.safetensors").eval()

    def _trained(self, model: str, data_name: str, size: int | None, weights: Path) -> Classifier:
        data = self.data(data_name)
        classifier = build(model, data.classes, data.channels, size or data.size)
        classifier.net.load_state_dict(load_file(weights))
        return classifier.to(self.device)

    def _train_teacher(self, name: str) -> Planned:
        teacher = self.params.teachers[name]
        data, recipe = self.data(teacher.data), self.params.recipes[teacher.recipe]
        index, size = np.arange(len(data.train.labels)), teacher.size or data.size
        compute = self.params.study.compute
        setting = Setting(data, index, teacher.model, size, None, recipe, teacher.seed, self.device, f"teacher {name}", compute)
        alone = Variant(PLAIN, PLAIN, {"hard_weight": 1.0})
        plan = Planned(alone, teacher.seed, identity.of_run(setting, None, alone))
        with checks.full_memory_refused(teacher.recipe, recipe):
            self._complete(setting, [plan])
        return plan

    def _finish(self, name: str, variants: list[Variant], seeds: list[int]) -> list[Path]:
        """Bring these runs to their end; here if all are finished, since another process takes seconds to start. Returns their folders."""
        groups = self.placement.groups(variants, seeds)
        # planned one by one, as far as the first that is not finished: each costs the loading of a teacher
        planned = (plan for group in groups for plan in self._plan(name, group)[1])
        run = functools.partial(self._run, name)
        ready = all(self.store.finished(plan.fingerprint) for plan in planned)
        done = [run(group) for group in groups] if ready else self.placement.run(run, groups)  # all, before the first is exported
        return [self._export(name, plan) for plans in done for plan in plans]

    def _run(self, name: str, group: Group) -> list[Planned]:
        setting, plans = self._plan(name, group)
        with checks.full_memory_refused(self.params.comparisons[name].recipe, setting.recipe):
            self._complete(setting, plans)
        return plans

    def _plan(self, name: str, group: Group) -> tuple[Setting, list[Planned]]:
        comparison, (variants, seed) = self.params.comparisons[name], group
        data, (teacher, digest) = self.data(comparison.data), self.teacher(comparison.teacher)
        index, recipe, title = _subset(data, comparison, seed), self.params.recipes[comparison.recipe], f"{name} seed {seed}"
        compute, most = self.params.study.compute, self.params.study.answers_gb
        setting = Setting(data, index, comparison.student, data.size, teacher, recipe, seed, self.device, title, compute, most)
        setting = replace(setting, cache_folder=beside_dvc_cache(self.root, ANSWERS) / identity.of_answers(setting, digest))
        return setting, [Planned(variant, seed, identity.of_run(setting, digest, variant)) for variant in variants]

    def _complete(self, setting: Setting, plans: list[Planned]) -> None:
        """Train together whatever of these runs is not finished."""
        # by fingerprint: a sweep may choose the very parameters that `methods` has, and that is one run under two names
        wanted = {plan.fingerprint: plan for plan in plans}
        with self.store.claim(key for key in wanted if not self.store.finished(key)) if rank() == 0 else nullcontext():
            there = dict(zip(wanted, from_rank_zero([self.store.finished(key) for key in wanted]), strict=True))
            if any(there.values()):
                say(f"{setting.title}  {sum(there.values())} of {len(wanted)} runs are finished already")
            if jobs := [_job(plan, self.store.run(key)) for key, plan in wanted.items() if not there[key]]:
                train(setting, jobs, save_seconds=self.params.study.checkpoint_seconds)
                wait_for_all()  # rank 0 has written
        if self.params.study.on_divergence == "fail":
            for plan in plans:
                metrics = read_json(self.store.run(plan.fingerprint) / "metrics.json")
                if metrics["status"] == "diverged":
                    what = f"{setting.title}: {plan.variant.name} diverged at step {metrics['diverged_step']}: {metrics['diverged_cause']}"
                    raise Diverged(f"params.yaml: study.on_divergence: found 'fail'; {what}; change that, or set on_divergence: continue")

    def _export(self, name: str, plan: Planned) -> Path:
        comparison, variant = self.params.comparisons[name], plan.variant
        data = self.data(comparison.data)
        folder = run_folder(self.root, (name, variant.name, plan.seed))
        described = {
            "comparison": name,
            "data": comparison.data,
            "classes": data.classes,
            "fraction": comparison.fraction,
            "train_images": len(_subset(data, comparison, plan.seed)),
            **comparison.model_dump(include={"teacher", "student", "recipe"}),
            "hard_loss": self.params.recipes[comparison.recipe].hard_loss,
            "method": variant.method,
            "variant": variant.name,
            "looks_at": looks_at(METHODS[variant.method]),
            "relational": METHODS[variant.method].relational,
            "parameters": dict(variant.parameters),
            "seed": plan.seed,
            "trial": variant.trial,
            "fingerprint": plan.fingerprint,
        }
        write_json(folder / "run.json", described)
        self.store.export(plan.fingerprint, folder)  # metrics.json comes last of all
        return folder

    def _chosen(self, name: str) -> Iterator[Variant]:
        """For each swept method the trial with the highest validation top-1; the first in params.yaml's order wins a tie."""
        comparison = self.params.comparisons[name]
        if comparison.sweep is None:
            return
        seed = comparison.sweep.seed

        def top1(trial: Variant) -> float:
            return float(read_json(run_folder(self.root, (name, trial.name, seed)) / "metrics.json").get("val_top1", -1.0))

        for method in comparison.sweep.grids:
            best = max((trial for trial in trials_of(comparison, self.params) if trial.method == method), key=top1)
            yield Variant(method + TUNED, method, best.parameters)

    def _import_checkpoint(self, name: str, data: DataSet) -> Path:
        """A checkpoint from elsewhere as a finished run of the store: measured, and in our weights' format."""
        teacher = self.params.teachers[name]
        path, size = self.root / str(teacher.checkpoint), teacher.size or data.size
        key, shape = f"teachers.{name}.checkpoint", (data.classes, data.channels, size)
        classifier = load_checkpoint(key, path, teacher.model, shape).to(self.device)
        folder = self.store.run(identity.of_checkpoint(path, teacher.model, size, data))
        try:
            write_measured(folder, classifier, data, self.device)
        except FloatingPointError as error:
            raise refuse(key, teacher.checkpoint, "weights that give finite logits", f"choose another file ({error})") from error
        return folder


def _subset(data: DataSet, comparison: Comparison, seed: int) -> Index:
    """The training images of a comparison's runs of this seed, by their positions in the training split."""
    return subset(data.train.labels, comparison.fraction, seed if comparison.subset_seed is None else comparison.subset_seed)


def _job(plan: Planned, folder: Path) -> Job:
    return Job(plan.variant.name, lambda: METHODS[plan.variant.method](**plan.variant.parameters), not plan.variant.trial, folder)
