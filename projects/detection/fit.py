"""Training of one detector: groups of images, a step for each batch of them, checkpoints, a curve."""

import time
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from kdlib.engine import checkpoint
from kdlib.engine.batchnorm import RunningStatistics
from kdlib.errors import refuse
from kdlib.parallel.ranks import any_rank, local_groups, mean_over_ranks, rank, say, world
from kdlib.parallel.signals import Stopped, asked_to_stop, held_back, watched
from kdlib.seed import seed_torch
from projects.detection.coco import GroupSampler, View, Views, loader
from projects.detection.optimizer import learning_rate, optimizer
from projects.detection.settings import General, Recipe

Row = dict[str, float | int]  # of the curve
CHECK_STEPS = 50  # a diverged run trains on for at most so many steps before anyone looks


class Learner:
    """A detector with its optimiser and its curve, one row per epoch with the mean of each loss.

    Gradients are averaged over processes when a batch is complete: 0.2 GB of a ResNet-50's Mask R-CNN in one message, which a step of
    seconds hides; random draws are named by (seed, group). So two processes with a group each are one with two groups.
    """

    def __init__(self, detector: nn.Module, recipe: Recipe, seed: int, steps_per_epoch: int) -> None:
        self.device = next(detector.parameters()).device
        if recipe.sync_norm and world() > 1 and self.device.type == "cuda":  # torch has it for GPUs alone
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        self.detector, self.recipe, self.seed, self.steps_per_epoch = detector.train(), recipe, seed, steps_per_epoch
        self.optimizer = optimizer(detector, recipe)
        fp16 = recipe.loss_scale > 0 and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=recipe.loss_scale or 1.0, enabled=fp16)
        self.step = 0
        self.curve: list[Row] = []
        self._running = RunningStatistics(detector, groups=recipe.groups)
        self._sums: dict[str, Float[Tensor, ""]] = {}  # of the losses of each step since the last row of the curve

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def backward(self, group: int, views: list[View]) -> None:
        """Add one group's share to the gradient of its step; ``group`` counts over all steps, from 0."""
        seed_torch(self.seed, "step", group)  # which proposals are looked at, sizes of views, drop path
        images = [view.to(self.device).float() / 255 for view, _ in views]
        targets = [{name: values.to(self.device) for name, values in target.items()} for _, target in views]
        with self._running, torch.autocast(self.device.type, torch.float16, enabled=self.scaler.is_enabled()):
            losses: dict[str, Tensor] = self.detector(images, targets)
        groups = len(local_groups(self.recipe.groups))
        self.scaler.scale(torch.stack(list(losses.values())).sum() / groups).backward()
        for name, loss in losses.items():
            share = loss.detach().double() / groups
            self._sums[name] = self._sums.get(name, torch.zeros_like(share)) + share

    def update(self) -> None:
        """Make the optimiser's step, when every group of the batch has added its gradient."""
        self._running.average()
        mean_over_ranks([parameter.grad for parameter in self.detector.parameters() if parameter.grad is not None])
        rate = learning_rate(self.recipe, self.step, self.steps_per_epoch)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate * parameters["scale"]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1

    def check(self) -> None:
        """Raise ``Refused`` when a loss was not finite."""
        bad = [name for name, loss in self._sums.items() if not loss.isfinite()]
        if any_rank(bool(bad))[0]:
            allowed = "a finite loss"
            do = "train with a lower learning_rate or a longer warm-up; the last checkpoint is from before"
            raise refuse("recipes", f"{', '.join(bad) or 'a loss'} that is not finite by step {self.step}", allowed, do)

    def close_epoch(self) -> Row:
        """Extend the curve by the means of the epoch that ends here."""
        self.check()
        sums = list(self._sums.values())
        mean_over_ranks(sums)
        means = {name: float(value) / self.steps_per_epoch for name, value in zip(self._sums, sums, strict=True)}
        row = {"epoch": self.step // self.steps_per_epoch, "step": self.step, "loss": sum(means.values()), **means}
        self.curve.append(row)
        self._sums = {}
        return row

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the curve so far. Every process calls it."""
        sums = [value.clone() for value in self._sums.values()]
        mean_over_ranks(sums)
        return {
            "step": self.step,
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "curve": self.curve,
            "sums": dict(zip(self._sums, sums, strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.detector.load_state_dict(state["detector"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.curve = state["step"], state["curve"]
        self._sums = {name: value.to(self.device) for name, value in state["sums"].items()}


def fit(learner: Learner, views: Views, general: General, folder: Path) -> None:
    """Train to the last step, from where the learner is. After SIGINT or SIGTERM it ends the step, saves and raises ``Stopped``."""
    recipe, total = learner.recipe, learner.total_steps
    local = local_groups(recipe.groups)
    groups = GroupSampler(len(views), recipe, learner.seed, learner.step)
    saved = time.monotonic()
    bar = tqdm(initial=learner.step, total=total, desc=folder.name, unit="step", disable=not watched() or rank() > 0)
    with held_back(), bar, loader(views, general.workers, batch_sampler=groups, collate_fn=list) as batches:
        for number, group in enumerate(batches):
            learner.backward(learner.step * recipe.groups + local[number % len(local)], group)
            if (number + 1) % len(local):
                continue
            learner.update()
            bar.update()
            if learner.step % CHECK_STEPS == 0:
                learner.check()
            if learner.step % learner.steps_per_epoch == 0:
                _say_losses(folder.name, learner.close_epoch(), total)
            stop, due = any_rank(asked_to_stop(), time.monotonic() - saved >= general.checkpoint_seconds)
            if stop or due or learner.step == total:
                save(folder, learner)
                saved = time.monotonic()
            if stop:
                raise Stopped(f"{folder.name}: stopped after step {learner.step} of {total}; the same command goes on from there")


def save(folder: Path, learner: Learner) -> None:
    """Write a checkpoint of a detector whose losses are finite so far. Every process calls it."""
    learner.check()
    state = learner.state_dict()
    if rank() == 0:
        checkpoint.save(folder, learner.step, state)


def _say_losses(name: str, row: Row, total_steps: int) -> None:
    if not watched():
        say(f"{name}  epoch {row['epoch']:g}  step {row['step']:g}/{total_steps}  loss {row['loss']:.3f}")
