"""The table of methods (after the paper's Table 3): what each looks at, what it gains at each scale, what it costs."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from kdlib.config.schema import Params
from kdlib.study.report import published, stats
from kdlib.study.report.differences import contests, leads
from kdlib.study.report.render import TIMES, Table, as_columns, lead, measured, number, records, scale
from kdlib.study.report.tables.comparisons import accuracies, family, stacked, sure

_KIND = ["looks_at", "relational"]
_SIZES = ["extra_parameters", "extra_bytes", "step_bytes"]
_COSTS = ["comparison", "method", *_KIND, *_SIZES, "together", "mean", "low", "high", "n", "seeds"]


def by_scale(params: Params) -> list[list[str]]:
    """The headline's comparisons, from the smallest to the largest scale: a list for each pair of models and each recipe."""
    contested = [places for (data, _, _), places in contests(params).items() if data == params.study.headline.data]
    return [list(places[recipe].values()) for places in contested for recipe in params.study.headline.recipes if recipe in places]


def ends(params: Params, names: list[str]) -> str:
    """``5 % minus 100 %``: the smallest scale minus the largest."""
    return " minus ".join(scale(params.comparisons[name].fraction) for name in (names[0], names[-1]))


def costs(params: Params, runs: pd.DataFrame, timing: pd.DataFrame, comparison: str) -> pd.DataFrame:
    """One row per method of a comparison, those that look at the same thing together: what it looks at and what it costs.

    mean, low, high, n, seeds: seconds per step relative to the baseline's, paired by seed. ``together``: both were trained in one process,
    step by step in turns. A run that the store had from another process is compared only where no seed has such a pair, and only with
    one of the same machine, number of threads and torch.
    """
    here = runs[(runs["comparison"] == comparison) & ~runs["trial"]]
    steps = here[here["status"] == "finished"].merge(timing, on=["comparison", "variant", "seed"], validate="one_to_one")
    steps["each"] = steps["student_seconds"] / steps["steps"]
    rows = []
    for method in params.comparisons[comparison].methods:
        part = here[here["variant"] == method]
        together, ratios = _ratios(steps[steps["variant"] == method], steps[steps["variant"] == params.study.baseline])
        row = {"comparison": comparison, "method": method, "together": together}
        row |= as_columns(stats.estimate(ratios, params.study.confidence))
        rows.append(row | {key: part[key].iloc[0] for key in _KIND} | {key: part[key].max() for key in _SIZES})
    frame = pd.DataFrame(rows, columns=_COSTS)
    kinds = list(dict.fromkeys(frame["looks_at"]))
    return frame.sort_values("looks_at", key=lambda names: names.map(kinds.index), kind="stable").reset_index(drop=True)


def _ratios(method: pd.DataFrame, baseline: pd.DataFrame) -> tuple[bool, stats.BySeed]:
    pairs = method.merge(baseline, on=["seed", "on"], suffixes=("", "_baseline"))
    # the runs of one process share its teacher's seconds evenly, and no other process has the same number to the last digit
    share = pairs["teacher_seconds_share"]
    same = pairs[(share == pairs["teacher_seconds_share_baseline"]) & (share > 0)]
    used = same if len(same) else pairs
    ratios = used["each"] / used["each_baseline"]
    return len(same) > 0, {int(seed): float(ratio) for seed, ratio in zip(used["seed"], ratios, strict=True)}


def method_tables(params: Params, runs: pd.DataFrame, timing: pd.DataFrame, numbers: pd.DataFrame, teachers: pd.DataFrame) -> list[Table]:
    """A table for each pair of models and each recipe of the headline; one row per method, those that look at the same thing together."""
    paper, top1_of_teacher = published.strategies(numbers), dict(zip(teachers["teacher"], teachers["test_top1"], strict=True))
    return [_methods(params, runs, timing, paper, top1_of_teacher, names) for names in by_scale(params)]


def called(params: Params, kind: str, names: list[str]) -> str:
    """The name of the table or figure for one of the lists of ``by_scale``: the first has no other's."""
    return kind if names == by_scale(params)[0] else f"{kind}_{names[-1]}"


def _methods(
    params: Params, runs: pd.DataFrame, timing: pd.DataFrame, paper: pd.DataFrame, teachers: dict[str, float], names: list[str]
) -> Table:
    reached, everyone, cost = accuracies(params, runs), leads(params, runs), costs(params, runs, timing, names[-1])
    reached = reached[reached["comparison"].isin(names)]
    ahead = everyone[(everyone["question"] == "lead") & everyone["comparison"].isin(names)]
    change = everyone[(everyone["question"] == "scale") & (everyone["comparison"] == f"{names[0]} minus {names[-1]}")]
    columns = {"looks at": _texts(cost, lambda row: row["looks_at"] + ", across the batch" * row["relational"])}
    for name, part in reached.groupby("comparison", sort=False):
        head = scale(params.comparisons[str(name)].fraction, part["train_images"].iloc[0])
        columns[f"{head}: top-1"] = _texts(part, lambda row: measured(row) or "diverged")
        columns[f"{head}: minus {params.study.baseline}"] = _texts(ahead[ahead["comparison"] == name], lead)
    if len(names) > 1:
        columns[f"lead, {ends(params, names)}"] = _texts(change, lead)
    columns["step time"] = _texts(cost, _time)
    columns["extra parameters"] = _texts(cost, lambda row: f"{row['extra_parameters']:,}")
    columns["kept beside (MiB)"] = _texts(cost, lambda row: _mebibytes(row["extra_bytes"]))
    columns["step memory (MiB)"] = _texts(cost, lambda row: _mebibytes(row["step_bytes"]))
    columns |= {f"published: {how}": _texts(part, lambda row: number(100 * row["mean"], 2)) for how, part in _settings(paper)}
    methods = dict.fromkeys([*cost["method"], *reached["method"]])
    shown = pd.DataFrame(columns, index=list(methods)).fillna("").rename_axis("method").reset_index()
    item = params.comparisons[names[-1]]
    models = f"{params.teachers[item.teacher].model} ({number(100 * teachers[item.teacher])} %) → {item.student}"
    title = f"Every method on {item.data}: {models}, recipe {item.recipe}, hard label {params.recipes[item.recipe].hard_loss}"
    frame = stacked({"accuracy": reached, "lead": ahead, "scale": change, "cost": cost, "published": paper})
    frame = frame.astype({key: "Int64" for key in ("n", "epochs", *_SIZES) if key in frame})
    frame = frame[["question", *frame.columns.drop("question")]]
    return Table(called(params, "methods", names), title, _caption(params, names, paper), frame, shown)


def _texts(frame: pd.DataFrame, tell: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    return {row["method"]: tell(row) for row in records(frame)}


def _time(row: dict[str, Any]) -> str:
    if row["n"] == 0:
        return ""
    half = "" if math.isnan(row["low"]) else f" ± {number((row['high'] - row['low']) / 2, 2)}"
    return f"{'' if row['together'] else '≈ '}{number(row['mean'], 2)}{half}{TIMES} (n={row['n']})"


def _mebibytes(size: Any) -> str:
    return "" if pd.isna(size) else number(size / 2**20)


def _settings(paper: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """("A2, 300 epochs", its rows) for each published recipe; with the models, where there are several pairs of them."""
    several = len(paper[["teacher", "student"]].drop_duplicates()) > 1
    parts = [part for _, part in paper.groupby(["recipe", "epochs", "teacher", "student"], sort=False, dropna=False)]
    return [(published.how(row) + f", {row['teacher']} → {row['student']}" * several, part) for part in parts for row in records(part[:1])]


def _caption(params: Params, names: list[str], paper: pd.DataFrame) -> str:
    change = f"“{ends(params, names)}”: positive where the lead shrinks, or the lag grows, with more data. " if len(names) > 1 else ""
    return (
        f"Test top-1 in percent, differences in points. {sure(params)} {change}{family(params)}. All methods see the same batches under "
        "one recipe, with the parameters of params.yaml; the hard label counts as much as each method's hard_weight says, and not for one "
        "without it. Looks at: what a method asks for; hint: of the teacher, beyond its logits; across the batch: its loss depends on "
        "which images share a batch, so the batch's size is one of its parameters. Costs are those at "
        f"{scale(params.comparisons[names[-1]].fraction)}. Step time: a student's step, without the teacher's pass that all methods share "
        f"(one that looks at no teacher saves it too), relative to {params.study.baseline}, paired by seed, both trained in turns by one "
        "process (≈: one after the other; blank: elsewhere or with other threads). Extra parameters are trained beside the student; kept "
        "beside: the memory of these and of a method's banks, throughout training. Step memory: activations, loss and gradients at their "
        f"peak; not weights, optimiser, batch, teacher.{_theirs(paper)}"
    )


def _theirs(paper: pd.DataFrame) -> str:
    if paper.empty:
        return ""
    sources = "; ".join(f"{how}: {', '.join(dict.fromkeys(part['source']))}" for how, part in _settings(paper))
    places = "; ".join(dict.fromkeys(paper["data"] + ", " + paper["teacher"] + " → " + paper["student"]))
    return (
        f" Published top-1 ({places}) as printed, blank where nobody published it; its sources: {sources}. The official commands of these "
        "recipes take bce on the hard label for methods on logits and ce for hints (results/published/recipes.csv), and mix images; for "
        "numbers quoted by others these are assumed settings."
    )
