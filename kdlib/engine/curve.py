"""The curve of a run: mean loss terms epoch by epoch, and the first step whose loss was not finite."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kdlib.parallel.ranks import gather_ranks, mean_over_ranks, world
from kdlib.types import Terms

Row = dict[str, float | int | None]


class LossCurve:
    """Sums the terms of every step on the device, and reads them once an epoch: ``add`` never waits for the device.

    ``rows`` holds one row per epoch; ``names`` the loss terms, in the order in which the method gives them.
    """

    def __init__(self, device: torch.device) -> None:
        self.rows: list[Row] = []
        self.names: list[str] = []
        self._sums = torch.zeros(0, dtype=torch.float64, device=device)  # of the terms of each step since the last row
        self._steps_summed = 0
        self._bad_step = torch.tensor(-1, device=device)
        self._bad_terms = torch.zeros(0, dtype=torch.bool, device=device)

    def add(self, terms: Terms, step: int, groups: int) -> None:
        """Note the terms of one of the ``groups`` that this process takes of a step."""
        values: Float[Tensor, " terms"] = torch.stack(list(terms.values()))
        if not self.names:
            self.names = list(terms)
            self._sums = torch.zeros(len(terms), dtype=torch.float64, device=values.device)
            self._bad_terms = torch.zeros(len(terms), dtype=torch.bool, device=values.device)
        bad = ~torch.isfinite(values)
        first = bad.any() & (self._bad_step < 0)
        self._bad_step = torch.where(first, step, self._bad_step)
        self._bad_terms = torch.where(first, bad, self._bad_terms)
        self._sums += values.double() / groups

    def end_step(self) -> None:
        """Count a step whose groups were all added."""
        self._steps_summed += 1

    def close_epoch(self, epoch: int, step: int, images_seen: int, val_top1: float | None) -> None:
        """Add a row: mean loss terms since the last row. Every process calls it."""
        self._agree()
        means = (self._sums / max(1, self._steps_summed)).tolist()
        row: Row = {"epoch": epoch, "step": step, "images_seen": images_seen, "loss": sum(means)}
        self.rows.append(row | {f"loss_{name}": mean for name, mean in zip(self.names, means, strict=True)} | {"val_top1": val_top1})
        self._sums.zero_()
        self._steps_summed = 0

    @property
    def last_step(self) -> int:
        """The step of the last row."""
        return int(self.rows[-1]["step"] or 0) if self.rows else 0

    @property
    def diverged_step(self) -> int | None:
        """The first step whose loss was not finite, or None. Waits for the device: ask between steps. Every process calls it."""
        self._agree()
        step = int(self._bad_step)
        return None if step < 0 else step

    @property
    def diverged_cause(self) -> str:
        """What was not finite, and what most often makes it so."""
        bad = [name for name, is_bad in zip(self.names, self._bad_terms.tolist(), strict=True) if is_bad]
        if not bad:
            return "the loss was finite but the trained student's logits are not: most often from a learning rate that is too high"
        if len(bad) == len(self.names):
            terms = ", ".join(bad)
            return f"no loss term ({terms}) was finite: the weights grew without bound, most often from a learning rate that is too high"
        return f"of the loss terms only {', '.join(bad)} was not finite: most often its weight is too high or its temperature too low"

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only. Every process calls it."""
        self._agree()
        return {
            "curve": self.rows,
            "names": self.names,
            "sums": self._sums,
            "steps_summed": self._steps_summed,
            "bad_step": self._bad_step,
            "bad_terms": self._bad_terms,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``; keys of others are left alone."""
        self.rows, self.names, self._steps_summed = state["curve"], state["names"], state["steps_summed"]
        device = self._bad_step.device
        self._sums, self._bad_step, self._bad_terms = (state[key].to(device) for key in ("sums", "bad_step", "bad_terms"))

    def _agree(self) -> None:
        """What the processes noted of the steps so far becomes the same in all of them."""
        if world() > 1:
            mean_over_ranks([self._sums])
            steps = gather_ranks(self._bad_step[None])
            first = torch.where(steps < 0, torch.iinfo(steps.dtype).max, steps).min()
            self._bad_step = torch.where((steps < 0).all(), -1, first)
            self._bad_terms = (gather_ranks(self._bad_terms[None]) & (steps == first)[:, None]).any(dim=0)
