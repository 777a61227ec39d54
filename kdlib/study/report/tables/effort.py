"""What tuning found with how many trials, and what every row cost."""

import json
import math
from typing import Any

import pandas as pd

from kdlib.config.schema import Params
from kdlib.study.report.differences import estimated, leads, ordered, same_setting, sweeps
from kdlib.study.report.render import TIMES, Cells, Table, lead, measured, number, records, spread
from kdlib.study.report.tables.comparisons import sure

_COUNTS = ["images_seen", "student_parameters", "extra_parameters", "train_flops", "teacher_flops"]


def grid(params: Params, runs: pd.DataFrame, comparison: str, method: str) -> pd.DataFrame:
    """One row per trial: the grid's parameters, val_top1 (NaN if diverged), status, and whether the tuned runs use this point."""
    axes = list(sweeps(params)[comparison].grids[method])
    rows = runs[(runs["comparison"] == comparison) & (runs["method"] == method)].reset_index(drop=True)
    points = pd.DataFrame([[json.loads(text)[axis] for axis in axes] for text in rows["parameters"]], columns=axes)
    chosen = set(points[rows["variant"] == f"{method}_tuned"].itertuples(index=False, name=None))
    points["val_top1"], points["status"] = rows["val_top1"], rows["status"]
    points["chosen"] = [tuple(point) in chosen for point in points[axes].itertuples(index=False, name=None)]
    return points[rows["trial"]].sort_values(axes).reset_index(drop=True)


def grid_tables(params: Params, runs: pd.DataFrame) -> list[Table]:
    """Each swept method's grid: rows are all parameters but the last, columns the last."""
    return [_grid(params, runs, name, method) for name, sweep in sweeps(params).items() for method in sweep.grids]


def _grid(params: Params, runs: pd.DataFrame, comparison: str, method: str) -> Table:
    item, sweep = params.comparisons[comparison], sweeps(params)[comparison]
    frame = grid(params, runs, comparison, method)
    *first, last = sweep.grids[method]
    cells: Cells = {}
    for row in records(frame):
        cell = number(100 * row["val_top1"]) if row["status"] == "finished" else row["status"]
        texts = cells.setdefault(tuple(f"{row[axis]:g}" for axis in first), {})
        texts[f"{last} {row[last]:g}"] = cell + (" (chosen)" if row["chosen"] else "")
    shown = spread(cells, first, (f"{last} {value:g}" for value in sorted(set(frame[last]))))
    caption = (
        f"Validation top-1 in percent, {item.data} ({100 * item.fraction:g} % of the training images, recipe {item.recipe}): {len(frame)} "
        f"trials, one run each at seed {sweep.seed} (n=1, so no interval). The point was chosen by these numbers, not by the test split."
    )
    title = f"{method}: {f' {TIMES} '.join([*first, last])} on {item.data}"
    return Table(f"grid_{comparison}_{method}", title, caption, frame.assign(seed=sweep.seed), shown)


def tuning_table(params: Params, runs: pd.DataFrame) -> Table:
    """Each swept method with its parameters of params.yaml and with the chosen ones: test top-1, and who leads whom.

    A row of ``frame`` with a ``baseline`` is a difference, one without is an accuracy.
    """
    everyone, against = leads(params, runs), [params.study.baseline, f"{params.study.baseline}_tuned"]
    everyone = everyone[everyone["question"].isin(("lead", "tuning"))]
    rows: list[dict[str, Any]] = []
    shown = []
    for comparison, sweep in sweeps(params).items():
        for method in sweep.grids:
            for variant in (method, f"{method}_tuned"):
                own, home = _tuning_row(params, runs, comparison, method, variant)
                ahead = everyone[(everyone["comparison"] == home) & (everyone["method"] == variant)]
                versus = {row["baseline"]: row for row in records(ahead)}
                rows += [own, *({**own, **versus[name]} for name in against if name in versus)]
                place = [own["data"], f"{own['recipe']}, {100 * own['fraction']:g} %", variant, own["parameters"], str(own["trials"])]
                shown.append([*place, measured(own), *(lead(versus[name]) if name in versus else "" for name in against)])
    columns = ["comparison", "data", "recipe", "fraction", "method", "parameters", "trials", "trial_seed", "baseline"]
    frame = pd.DataFrame(rows, columns=[*columns, "mean", "low", "high", "n", "seeds", "p_holm", "verdict"]).astype({"trial_seed": "Int64"})
    heads = ["data set", "recipe, images", "method", "parameters", "trials", "test top-1", *(f"minus {name}" for name in against)]
    seeds = ", ".join(sorted({str(sweep.seed) for sweep in sweeps(params).values()}))
    caption = (
        f"Test top-1 in percent, differences in points. {sure(params)} `_tuned` uses the point of the grid with the best validation top-1 "
        f"at seed {seeds}, after the same number of trials for every method; the test split took no part in the choice. Untuned methods "
        "come from the comparison with the same data, images, models and recipe; their verdicts are those of the table data_scale. "
        "Verdicts of tuned methods: Holm over this table's pairs on one data set."
    )
    return Table("tuning", "What tuning gains, with equal effort for every method", caption, frame, pd.DataFrame(shown, columns=heads))


def _tuning_row(params: Params, runs: pd.DataFrame, comparison: str, method: str, variant: str) -> tuple[dict[str, Any], str | None]:
    """The accuracy of a swept method, tuned or not, and the comparison that measured it (None: the study has none)."""
    item, sweep = params.comparisons[comparison], sweeps(params)[comparison]
    tuned = variant != method
    home = comparison if tuned else same_setting(params, comparison, method)
    texts: list[str] = list(runs.loc[(runs["comparison"] == (home or "")) & (runs["variant"] == variant), "parameters"])
    values = json.loads(texts[0]) if texts else {}
    row = {key: getattr(item, key) for key in ("data", "recipe", "fraction")} | {"comparison": home or comparison, "method": variant}
    row |= {"parameters": ", ".join(f"{axis} {values[axis]:g}" for axis in sweep.grids[method] if axis in values)}
    row |= {"trials": _trials(runs, comparison, method) if tuned else 0, "trial_seed": sweep.seed if tuned else None}
    return row | estimated(params, runs, home or "", variant), home


def _trials(runs: pd.DataFrame, comparison: str, method: str) -> int:
    return int(((runs["comparison"] == comparison) & (runs["method"] == method) & runs["trial"]).sum())


def cost_table(params: Params, runs: pd.DataFrame) -> Table:
    """What one run of each method costs, and how many trials chose it. Only what repeats exactly: seconds are in timing.csv."""
    students = runs[~runs["trial"] & (runs["status"] == "finished")]
    rows: list[dict[str, Any]] = []
    for name in ordered(params):
        here = students[students["comparison"] == name]
        home = same_setting(params, name, params.study.baseline)
        base = students[(students["comparison"] == home) & (students["variant"] == params.study.baseline)]["train_flops"].max()
        sharing = here.loc[here["teacher_flops"] > 0, "variant"].nunique()
        for (variant, method), part in here.groupby(["variant", "method"], sort=False):
            counts = {column: int(part[column].max()) for column in _COUNTS}
            row = {"comparison": name, "data": params.comparisons[name].data, "method": variant, **counts}
            row["relative"] = math.nan if pd.isna(base) else counts["train_flops"] / int(base)
            row["sharing"] = sharing if counts["teacher_flops"] else 0
            rows.append(row | {"trials": _trials(runs, name, str(method)) if variant != method else 0})
    columns = ["comparison", "data", "method", *_COUNTS, "relative", "sharing", "trials"]
    heads = ["comparison", "data set", "method", "images seen", "student parameters", "extra parameters", "student TFLOPs"]
    heads += ["teacher TFLOPs", f"student, relative to {params.study.baseline}", "students sharing the teacher", "trials"]
    caption = (
        "Per finished run, the same for every seed. TFLOPs: 1e12 floating point operations. Student: forward and backward passes of the "
        "whole training. Teacher: one pass over the same images, made once and shared by so many students of a seed. Trials: further runs "
        "that chose the row's parameters, each as costly as the row itself."
    )
    shown = pd.DataFrame([_cost_row(row) for row in rows], columns=heads)
    return Table("cost", "What each row cost", caption, pd.DataFrame(rows, columns=columns), shown)


def _cost_row(row: dict[str, Any]) -> list[str]:
    counts = [f"{row[column]:,}" for column in _COUNTS[:3]]
    operations = [f"{row[column] / 1e12:.3g}" for column in _COUNTS[3:]]
    relative = number(row["relative"], 2) + ("" if math.isnan(row["relative"]) else TIMES)
    return [row["comparison"], row["data"], row["method"], *counts, *operations, relative, str(row["sharing"]), str(row["trials"])]
