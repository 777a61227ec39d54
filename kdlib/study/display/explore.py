"""What explore.ipynb asks of a finished study: its runs, and the two answers to every image of a split."""

from pathlib import Path

import pandas as pd

from kdlib.engine.metrics import EVALUATION_BATCH, predict
from kdlib.errors import Refused, known
from kdlib.study.report import collect
from kdlib.study.training import planned
from kdlib.study.training.experiment import Experiment


def finished(experiment: Experiment) -> pd.DataFrame:
    """The finished runs of params.yaml in its order, with the columns of results/runs.csv, by (comparison, variant, seed).

    Raises ``Refused`` when there is none.
    """
    expected = planned.expected(experiment.params)
    there = [run for run in expected if (planned.run_folder(experiment.root, run) / "metrics.json").is_file()]
    if not there:
        raise Refused(f"runs: found none of the {len(expected)} that params.yaml asks for in {experiment.root}; run `make study` first")
    return collect.collect(experiment.root, there).set_index(["comparison", "variant", "seed"])


def folders(experiment: Experiment, runs: pd.DataFrame) -> dict[str, Path]:
    """Where rows of ``finished`` lie, by "comparison variant, seed s"."""
    return {f"{run[0]} {run[1]}, seed {run[2]}": planned.run_folder(experiment.root, run) for run in runs.index}


def predictions(experiment: Experiment, comparison: str, folder: Path, split: str = "test") -> pd.DataFrame:
    """What a comparison's teacher and the student of a run say of each image of a split, one row each, in the split's order.

    ``label`` is the true class, ``teacher`` and ``student`` are the classes they choose, ``teacher_p`` and ``student_p`` the
    probabilities in [0, 1] that they give their choice. Raises ``Refused`` for a student that diverged.
    """
    item = experiment.params.comparisons[known("comparisons", comparison, experiment.params.comparisons)]
    images = getattr(experiment.data(item.data), split)
    frame = pd.DataFrame({"label": images.labels})
    for name, model in (("teacher", experiment.teacher(item.teacher)[0]), ("student", experiment.student(comparison, folder))):
        logits = predict(model, images.images, EVALUATION_BATCH, experiment.device)
        if not logits.isfinite().all():
            raise Refused(f"{folder}: its {name} gives logits that are not finite (it diverged); choose another run")
        probability, choice = logits.double().softmax(dim=1).max(dim=1)
        frame[name], frame[f"{name}_p"] = choice.numpy(), probability.numpy()
    return frame
