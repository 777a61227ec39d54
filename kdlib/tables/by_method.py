"""The table of methods (after the paper's Table 3): what each looks at, what it gains at each scale, what it costs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from kdlib import published, stats
from kdlib.config import Study
from kdlib.tables.comparisons import HERE, accuracies, sure
from kdlib.tables.leads import contests, leads, train_images
from kdlib.tables.render import TIMES, Table, lead, measured, number, records, scale, told

_MIB = 2**20
_KIND = ["looks_at", "relational"]
_SIZES = ["extra_parameters", "step_bytes"]
_COSTS = ["comparison", "method", *_KIND, *_SIZES, "together", "mean", "low", "high", "n", "seeds"]


def by_scale(study: Study) -> list[list[str]]:
    """The headline's comparisons, from the smallest to the largest scale: a list for each pair of models and each recipe."""
    general = study.study.headline
    lists = [
        [name for (of, _), name in places.items() if of == recipe]
        for (data, _, _), places in contests(study).items()
        if data == general.data
        for recipe in general.recipes
    ]
    return [names for names in lists if names]


def ends(study: Study, names: list[str]) -> str:
    """``5 % minus 100 %``: the smallest scale minus the largest."""
    return " minus ".join(scale(study.comparisons[name].fraction) for name in (names[0], names[-1]))


def costs(study: Study, runs: pd.DataFrame, timing: pd.DataFrame, comparison: str) -> pd.DataFrame:
    """One row per method of a comparison, those that look at the same thing together: what it looks at and what it costs.

    mean, low, high, n, seeds: seconds per step relative to the baseline's, paired by seed. ``together``: both were trained in one process,
    step by step in turns. A run that the store had from another process is compared only where no seed has such a pair.
    """
    here = runs[(runs["comparison"] == comparison) & ~runs["trial"]]
    steps = here[here["status"] == "finished"].merge(timing, on=["comparison", "variant", "seed"], validate="one_to_one")
    steps["each"] = steps["student_seconds"] / steps["steps"]
    rows = []
    for method in study.comparisons[comparison].methods:
        part = here[here["variant"] == method]
        together, ratios = _ratios(steps[steps["variant"] == method], steps[steps["variant"] == study.study.baseline])
        row = {"comparison": comparison, "method": method, "together": together, **told(stats.estimate(ratios, study.study.confidence))}
        rows.append(row | {key: part[key].iloc[0] for key in _KIND} | {key: part[key].max() for key in _SIZES})
    frame = pd.DataFrame(rows, columns=_COSTS)
    kinds = list(dict.fromkeys(frame["looks_at"]))
    return frame.sort_values("looks_at", key=lambda names: names.map(kinds.index), kind="stable").reset_index(drop=True)


def _ratios(method: pd.DataFrame, baseline: pd.DataFrame) -> tuple[bool, stats.BySeed]:
    pairs = method.merge(baseline, on="seed", suffixes=("", "_baseline"))
    # the runs of one process share its teacher's seconds evenly, and no other process has the same number to the last digit
    share = pairs["teacher_seconds_share"]
    same = pairs[(share == pairs["teacher_seconds_share_baseline"]) & (share > 0)]
    used = same if len(same) else pairs
    ratios = used["each"] / used["each_baseline"]
    return len(same) > 0, {int(seed): float(ratio) for seed, ratio in zip(used["seed"], ratios, strict=True)}


def methods(study: Study, runs: pd.DataFrame, timing: pd.DataFrame, numbers: pd.DataFrame) -> list[Table]:
    """A table for each pair of models and each recipe of the headline; one row per method, those that look at the same thing together."""
    lists = by_scale(study)
    tables = [_methods(study, runs, timing, published.strategies(numbers), names) for names in lists]
    return [
        *tables[:1],
        *(dataclasses.replace(table, name=f"methods_{names[-1]}") for table, names in zip(tables[1:], lists[1:], strict=True)),
    ]


def _methods(study: Study, runs: pd.DataFrame, timing: pd.DataFrame, paper: pd.DataFrame, names: list[str]) -> Table:
    reached, everyone, cost = accuracies(study, runs), leads(study, runs), costs(study, runs, timing, names[-1])
    reached = reached[reached["comparison"].isin(names)]
    ahead = everyone[(everyone["question"] == "lead") & everyone["comparison"].isin(names)]
    change = everyone[(everyone["question"] == "scale") & (everyone["comparison"] == f"{names[0]} minus {names[-1]}")]
    columns = [("looks at", _texts(cost, _looks_at))]
    for name in names:
        place = scale(study.comparisons[name].fraction, train_images(runs, name))
        columns.append((f"{place}: top-1", _texts(reached[reached["comparison"] == name], lambda row: measured(row) or "diverged")))
        columns.append((f"{place}: minus {study.study.baseline}", _texts(ahead[ahead["comparison"] == name], lead)))
    if len(names) > 1:
        columns.append((f"lead, {ends(study, names)}", _texts(change, lead)))
    columns += [
        ("step time", _texts(cost, _time)),
        ("extra parameters", _texts(cost, _extra)),
        ("step memory (MiB)", _texts(cost, _memory)),
    ]
    for how, part in _recipes(paper):
        columns.append((f"published: {how}", _texts(part, lambda row: number(100 * row["top1"], 2))))
    rows = list(dict.fromkeys([*cost["method"], *reached["method"]]))
    shown = pd.DataFrame(
        [[method, *(texts.get(method, "") for _, texts in columns)] for method in rows], columns=["method", *(head for head, _ in columns)]
    )
    item = study.comparisons[names[-1]]
    label = study.recipes[item.recipe].hard_loss
    title = f"Every method on {item.data}: {item.teacher} → {item.student}, recipe {item.recipe}, hard label {label}"
    theirs = paper.assign(mean=paper["top1"], source=paper["kind"] + ": " + paper["source"]).drop(columns=["top1", "kind"])
    parts = {"accuracy": reached, "lead": ahead, "scale": change, "cost": cost, "published": theirs}
    sourced = [part.assign(question=question, source=part.get("source", HERE)) for question, part in parts.items() if len(part)]
    frame = pd.concat(sourced, ignore_index=True).astype(dict.fromkeys(("n", "epochs", *_SIZES), "Int64"))
    return Table("methods", title, _caption(study, names, paper), frame[["question", *frame.columns.drop("question")]], shown)


def _texts(frame: pd.DataFrame, tell: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    return {row["method"]: tell(row) for row in records(frame)}


def _looks_at(row: dict[str, Any]) -> str:
    return f"{row['looks_at']}{', across the batch' if row['relational'] else ''}"


def _time(row: dict[str, Any]) -> str:
    if row["n"] == 0:
        return ""
    half = "" if math.isnan(row["low"]) else f" ± {number((row['high'] - row['low']) / 2, 2)}"
    return f"{'' if row['together'] else '≈ '}{number(row['mean'], 2)}{half}{TIMES} (n={row['n']})"


def _extra(row: dict[str, Any]) -> str:
    return f"{row['extra_parameters']:,}"


def _memory(row: dict[str, Any]) -> str:
    return "" if pd.isna(row["step_bytes"]) else number(row["step_bytes"] / _MIB)


def _recipes(paper: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """("A2, 300 epochs", its rows) for each published recipe."""
    return [(f"{recipe}, {epochs} epochs", part) for (recipe, epochs), part in paper.groupby(["recipe", "epochs"], sort=False)]


def _caption(study: Study, names: list[str], paper: pd.DataFrame) -> str:
    sources = "; ".join(f"{how}: {', '.join(dict.fromkeys(part['kind'] + ': ' + part['source']))}" for how, part in _recipes(paper))
    places = "; ".join(dict.fromkeys(paper["data"] + ", " + paper["teacher"] + " → " + paper["student"]))
    return (
        f"Test top-1 in percent, differences in points. {sure(study)} Verdicts hold family-wise at {100 * study.study.confidence:g} % "
        "(Holm over the answers to one question on one data set). All methods see the same batches under one recipe and one hard label, "
        "with the parameters of params.yaml; none is tuned. Looks at: what a method asks the teacher for beyond its logits; across the "
        "batch: it compares the images of a batch, so the batch's size is one of its parameters. Costs are those at "
        f"{scale(study.comparisons[names[-1]].fraction)}: seconds of a step relative to {study.study.baseline}, paired by seed, both "
        "trained in turns by one process (≈: not so); parameters trained beside the student's own; memory of one step at its peak. "
        f"Published top-1 ({places}) as printed, blank where nobody published it; its sources: {sources}."
    )
