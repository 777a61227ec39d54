"""A small study and runs with known accuracies, in the form in which the pipeline leaves them on disk."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib import config
from kdlib.config.references import grid_points
from kdlib.config.schema import Comparison, Params
from kdlib.files import write_json
from kdlib.study.report import build, collect, published
from kdlib.study.training import planned

RANDAUGMENT = {"operations": 0, "magnitude": 0.0, "magnitude_std": 0.0}
RECIPE = {
    **{"epochs": 2.0, "batch_size": 4, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0, "warmup": 0.0, "hard_loss": "ce"},
    **{"label_smoothing": 0.0, "drop_path": 0.0, "crop_padding": 0.0, "crop_min_area": 1.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0},
    **{"randaugment": RANDAUGMENT, "erasing": 0.0, "augment": "batched", "group_size": None, "repeats": 1, "clip_norm": 0.0, "ema": []},
    **{"warmup_lr": 0.0, "min_lr": 0.0, "milestones": []},
}
DIGITS = {"source": "digits", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0, "hflip": 0.0}
METHODS = {
    "no_kd": {"hard_weight": 1.0},
    "kd": {"hard_weight": 1.0, "weight": 1.0, "temperature": 1.0},
    "dkd": {"hard_weight": 1.0, "weight": 1.0, "warmup": 0.0, "alpha": 1.0, "beta": 2.0, "temperature": 1.0},
    "dist": {"hard_weight": 1.0, "weight": 1.0, "beta": 1.0, "gamma": 1.0, "tau": 1.0},
}
GRIDS = {"kd": {"temperature": [1.0, 4.0], "weight": [1.0, 2.0]}, "dkd": {"beta": [1.0, 2.0], "temperature": [1.0, 4.0]}}
CHOSEN = {"kd": {"temperature": 4.0, "weight": 1.0}, "dkd": {"beta": 2.0, "temperature": 4.0}}

LOOKS_AT = {"no_kd": "no teacher", "maps_only": "hint: maps", "ranks": "hint: embedding"}  # the others: logits
PLACE = {"data": "digits", "subset_seed": None, "teacher": "big", "student": "net", "sweep": None}
TABLES = ["data_scale", "recipes", "tuning", "cost", "measures"]

# test top-1 by (comparison, variant), one number per seed 0, 1, 2
ACCURACY = {
    ("small_weak", "no_kd"): (0.40, 0.42, 0.41),
    ("small_weak", "kd"): (0.50, 0.54, 0.52),
    ("small_weak", "dkd"): (0.60, 0.65, 0.62),  # leads .10 .11 .10
    ("small_weak", "dist"): (0.51, 0.53, 0.53),
    ("large_weak", "no_kd"): (0.60, 0.61, 0.62),
    ("large_weak", "kd"): (0.70, 0.71, 0.72),
    ("large_weak", "dkd"): (0.72, 0.73, 0.73),  # leads .02 .02 .01
    ("large_weak", "dist"): (0.69, 0.71, 0.72),
    ("small_strong", "no_kd"): (0.38, 0.39, 0.40),
    ("small_strong", "kd"): (0.52, 0.55, 0.53),
    ("small_strong", "dkd"): (0.57, 0.61, 0.59),
    ("small_strong", "dist"): (0.51, 0.53, 0.53),
    ("large_strong", "no_kd"): (0.59, 0.60, 0.61),
    ("large_strong", "kd"): (0.71, 0.72, 0.73),
    ("large_strong", "dkd"): (0.71, 0.73, 0.73),
    ("large_strong", "dist"): (0.70, 0.71, 0.73),
    ("tune", "kd_tuned"): (0.61, 0.64, 0.63),
    ("tune", "dkd_tuned"): (0.63, 0.64, 0.64),
}


# A second study: every method under one recipe, two more hard labels; test top-1 by (comparison, method), one number per seed 0, 1, 2
METHODWISE = {
    ("small", "no_kd"): (0.40, 0.42, 0.41),
    ("small", "kd"): (0.50, 0.54, 0.52),
    ("small", "maps_only"): (0.58, 0.62, 0.61),  # leads .08 .08 .09
    ("small", "dkd"): (0.60, 0.65, 0.62),
    ("small", "ranks"): (0.40, 0.44, 0.43),  # leads -.10 -.10 -.09
    ("large", "no_kd"): (0.60, 0.61, 0.62),
    ("large", "kd"): (0.70, 0.71, 0.72),
    ("large", "maps_only"): (0.70, 0.72, 0.71),  # leads .00 .01 -.01
    ("large", "dkd"): (0.72, 0.73, 0.73),
    ("large", "ranks"): (0.69, 0.70, 0.70),
    ("large_bce", "kd"): (0.66, 0.66, 0.68),  # -.04 -.05 -.04 against ce
    ("large_bce", "dkd"): (0.70, 0.72, 0.72),
    ("large_none", "kd"): (0.71, 0.70, 0.72),
    ("large_none", "dkd"): (0.73, 0.74, 0.75),
}


def params(**changes: Any) -> Params:
    """Two scales, two recipes, one sweep; ``changes`` replace keys of the section ``study``."""
    teacher = {"data": "digits", "model": "net", "size": None, "recipe": "weak", "seed": 0, "checkpoint": None, "min_top1": 0.5}
    comparisons = {
        f"{size}_{recipe}": {**PLACE, "fraction": fraction, "recipe": recipe, "methods": list(METHODS)}
        for size, fraction in (("large", 1.0), ("small", 0.1))
        for recipe in ("weak", "strong")
    }
    tune = {**PLACE, "fraction": 0.1, "recipe": "weak", "methods": [], "sweep": {"seed": 0, "grids": GRIDS}}
    headline = {"data": "digits", "recipes": ["weak", "strong"]}
    general = {"seeds": [0, 1, 2], "baseline": "kd", "challengers": ["dkd", "dist"], "confidence": 0.95, "answers_gb": 0.0}
    general |= {
        "launch": {"processes": 1, "nodes": 1, "rendezvous": None},
        "compute": {"precision": "auto", "compile": "auto", "resident": "auto", "ahead": "auto"},
    }
    return config.parse(
        {
            "study": {
                **general,
                **{"on_divergence": "continue", "missing": "fail", "published": {}},
                "checkpoint_seconds": 0.0,
                "tables": TABLES,
                "headline": headline,
                **changes,
            },
            "data": {"digits": DIGITS},
            "teachers": {"big": teacher},
            "recipes": {"weak": RECIPE, "strong": RECIPE},
            "methods": METHODS,
            "comparisons": {**comparisons, "tune": tune},
        }
    )


SECONDS = {"no_kd": 9.0, "maps_only": 15.0, "ranks": 11.0}  # of seed 0; the others: 10


def methodwise(**changes: Any) -> Params:
    """The study of ``METHODWISE``; ``changes`` replace keys of the section ``study``."""
    content = params().model_dump()
    content["study"] |= {"tables": ["methods", "losses", "measures"], "headline": {"data": "digits", "recipes": ["weak"]}}
    content["study"] |= {"challengers": ["no_kd", "maps_only", "dkd", "ranks"], **changes}
    content["recipes"] = {f"weak{end}": {**RECIPE, "hard_loss": loss} for end, loss in (("", "ce"), ("_bce", "bce"), ("_none", "none"))}
    content["methods"] = {name: METHODS.get(name, {"weight": 1.0}) for name in ("no_kd", "kd", "maps_only", "dkd", "ranks")}
    homes = {"large_bce": (1.0, "weak_bce"), "large": (1.0, "weak"), "small": (0.1, "weak"), "large_none": (1.0, "weak_none")}
    content["comparisons"] = {
        name: {**PLACE, "fraction": fraction, "recipe": recipe, "methods": [method for home, method in METHODWISE if home == name]}
        for name, (fraction, recipe) in homes.items()
    }
    return config.parse(content)


def descriptions(of: Params) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """run.json and metrics.json of every run, in the order of a study: the trials of a sweep come first."""
    for name, item in of.comparisons.items():
        if item.sweep is not None:
            for method, grid in item.sweep.grids.items():
                for point in grid_points(grid):
                    top1 = 0.6 + 0.01 * sum(point[axis] == CHOSEN[method][axis] for axis in point)
                    variant = f"trial/{method}." + ".".join(f"{axis}_{value:g}" for axis, value in point.items())
                    yield _run(name, item, (method, variant), {**of.methods[method], **point}, 0) | {"trial": True}, _metrics({"val": top1})
        plain = {method: (method, of.methods[method]) for method in item.methods}
        tuned = {
            f"{method}_tuned": (method, {**of.methods[method], **CHOSEN[method]}) for method in (item.sweep.grids if item.sweep else {})
        }
        for variant, (method, parameters) in {**plain, **tuned}.items():
            for seed in of.study.seeds:
                top1 = (ACCURACY | METHODWISE)[name, variant][seed]
                run = _run(name, item, (method, variant), parameters, seed) | {"hard_loss": of.recipes[item.recipe].hard_loss}
                yield run, _metrics({"val": top1 - 0.01, "test": top1}, method)


def _run(name: str, item: Comparison, who: tuple[str, str], parameters: dict[str, float], seed: int) -> dict[str, Any]:
    where = {"comparison": name, "data": item.data, "classes": 10, "fraction": item.fraction, "train_images": round(1000 * item.fraction)}
    how = {"teacher": item.teacher, "student": item.student, "recipe": item.recipe, "hard_loss": "ce", "method": who[0], "variant": who[1]}
    how |= {"looks_at": LOOKS_AT.get(who[0], "logits"), "relational": who[0] in ("dist", "ranks")}
    return {**where, **how, "parameters": parameters, "seed": seed, "trial": False, "fingerprint": "f" * 8}


def _metrics(top1: dict[str, float], method: str = "kd") -> dict[str, Any]:
    found: dict[str, Any] = {"status": "finished", "diverged_step": None, "diverged_cause": None, "images_seen": 2000, "steps": 500}
    found |= {"student_parameters": 12345, "extra_parameters": {"dist": 7, "maps_only": 1000}.get(method, 0)}
    found |= {"extra_bytes": 2**19 if method == "maps_only" else 0, "step_bytes": 3 * 2**20}
    found |= {"train_flops": 3 * 10**12 if method == "dkd" else 2 * 10**12, "teacher_flops": 0 if method == "no_kd" else 9 * 10**12}
    for split, value in top1.items():
        others = {"top5": 1.0, "nll": 2 - value + 1e-8, "ece": value / 10, "agreement": value, "teacher_kl": 1 - value}
        found |= {f"{split}_{measure}": number for measure, number in {"top1": value, **others}.items()}
    return found


def diverged(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same run, had its loss stopped being finite: its measures are absent."""
    kept = {key: value for key, value in metrics.items() if not key.startswith(("val_", "test_"))}
    return kept | {"status": "diverged", "diverged_step": 17, "diverged_cause": "learning_rate 0.1 is too large, perhaps"}


def write(root: Path, run: dict[str, Any], metrics: dict[str, Any]) -> planned.Run:
    """One run directory."""
    name = (run["comparison"], run["variant"], run["seed"])
    folder = planned.run_folder(root, name)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    seconds = SECONDS.get(run["method"], 10.0) * (1 + run["seed"])  # the machine slows down from seed to seed
    (folder / "timing.json").write_text(json.dumps({"student_seconds": seconds, "teacher_seconds_share": 0.5 + run["seed"]}))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu", "threads": 2, "torch": "2.15.0"}))
    (folder / "curve.csv").write_text("epoch,step,images_seen,loss,loss_hard,val_top1\n1,250,1000,2.5,2.5,\n2,500,2000,1.5,1.5,0.5\n")
    return name


def study_on_disk(root: Path, of: Params) -> list[planned.Run]:
    """Every run of a study; returns their names."""
    return [write(root, run, metrics) for run, metrics in descriptions(of)]


def runs(root: Path, of: Params) -> pd.DataFrame:
    """runs.csv's frame of a study written below ``root``."""
    return collect.collect(root, study_on_disk(root, of))


TEACHERS = pd.DataFrame({"teacher": ["big"], "test_top1": [0.9]})


def numbers(root: Path, of: Params) -> build.Numbers:
    """What tables and figures of a study are made of, written below ``root`` and read again; a teacher that was loaded has no curve."""
    study_on_disk(root, of)
    for name in of.teachers:
        write_json(root / planned.TEACHERS / name / "metrics.json", {"test_top1": 0.9})
        (root / planned.TEACHERS / name / "curve.csv").write_text("epoch,loss,val_top1\n1,2.0,\n2,1.0,0.8\n")
    published_here = root / published.FILE
    published_here.parent.mkdir(parents=True)
    published_here.write_bytes((Path(__file__).parents[1] / published.FILE).read_bytes())
    return build.read_numbers(root, of, of)
