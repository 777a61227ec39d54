"""Which runs a params.yaml asks for, by name: pure bookkeeping, read by the stages that train and by those that report."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdlib.config.references import grid_points
from kdlib.config.schema import Comparison, Params

DATA = Path("runs/data")  # <name>/ below it
DISTILL = Path("runs/distill")  # <comparison>/<variant>/seed_<s>/ below it
TEACHERS = Path("runs/teacher")  # <name>/ below it
Run = tuple[str, str, int]  # comparison, variant, seed

TUNED = "_tuned"  # what a method is called at the point that its sweep chose


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: a method at a point of its parameters."""

    name: str  # folder and row: "dkd", "dkd_tuned", "trial/dkd.beta_4"
    method: str
    parameters: Mapping[str, float]
    trial: bool = False


def trials_of(comparison: Comparison, params: Params) -> list[Variant]:
    """The trials of a comparison's sweep; parameters that are not in the grid stay as ``methods`` has them."""
    grids = comparison.sweep.grids if comparison.sweep else {}
    points = [(method, point) for method, grid in grids.items() for point in grid_points(grid)]
    names = ["trial/" + ".".join([method, *(f"{key}_{_short(value)}" for key, value in point.items())]) for method, point in points]
    return [Variant(name, method, params.methods[method] | point, trial=True) for name, (method, point) in zip(names, points, strict=True)]


def _short(value: float) -> str:
    """As people write it, with all the digits that tell it from another."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def methods_of(comparison: Comparison, params: Params) -> list[Variant]:
    """The methods of a comparison at their own parameters."""
    return [Variant(method, method, params.methods[method]) for method in comparison.methods]


def expected_runs(params: Params, name: str) -> list[Run]:
    """Every run of one comparison."""
    comparison = params.comparisons[name]
    names, trials = list(comparison.methods), []
    if comparison.sweep:
        trials = [(name, trial.name, comparison.sweep.seed) for trial in trials_of(comparison, params)]
        names += [method + TUNED for method in comparison.sweep.grids]
    return trials + [(name, variant, seed) for variant in names for seed in params.study.seeds]


def expected(params: Params) -> list[Run]:
    """Every run that params.yaml asks for, in its order."""
    return [run for name in params.comparisons for run in expected_runs(params, name)]


def run_folder(root: Path, run: Run) -> Path:
    """The folder of one run in the project at ``root``."""
    comparison, variant, seed = run
    return root / DISTILL / comparison / variant / f"seed_{seed}"
