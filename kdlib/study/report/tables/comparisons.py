"""The tables of accuracies: by data scale (after the paper's Figure 1), by recipe (after its Table 1), and all six measures."""

from typing import Any

import pandas as pd

from kdlib.config.schema import Params
from kdlib.study.report import collect, published
from kdlib.study.report.differences import estimated, leads, ordered, train_images
from kdlib.study.report.render import Cells, Table, lead, measured, number, records, scale, spread

PAPER = "Hao et al. 2023"
HERE = "measured here"
_NATS = ("nll", "teacher_kl")
_UNITS = {name: f"{name} ({'nats' if name in _NATS else '%'})" for name in collect.MEASURES}


def sure(params: Params) -> str:
    """How every number of a caption was measured, and which comparisons have settings that no public source gives."""
    seeds = ", ".join(map(str, params.study.seeds))
    assumed = [name for name, item in params.study.published.items() if item.settings == "assumed" and name in params.comparisons]
    of_assumed = f" Assumed settings, of which nobody can say that they are the paper's: {', '.join(assumed)}." if assumed else ""
    return (
        f"Seeds {seeds}. ± is half the width of a {100 * params.study.confidence:g} % Student t interval over n seeds, differences paired "
        "by seed; it is absent where fewer than two seeds finished or all of them agree exactly. Diverged runs are left out and reduce n."
        + of_assumed
    )


def family(params: Params) -> str:
    """What the verdicts of a caption hold for."""
    return f"Verdicts hold family-wise at {100 * params.study.confidence:g} % (Holm over the answers to one question on one data set)"


def stacked(parts: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Answers to several questions, one below the other; measured here where they name no other source."""
    named = [part.assign(question=question, source=part.get("source", HERE)) for question, part in parts.items() if len(part)]
    return pd.concat(named, ignore_index=True)


def alone(runs: pd.DataFrame) -> str:
    """What a student without a teacher is called here: published numbers call it the student."""
    return str(next(iter(runs.loc[runs["teacher_flops"] == 0, "method"]), "student"))


def data_scale_table(params: Params, runs: pd.DataFrame, numbers: pd.DataFrame) -> Table:
    """The challengers' lead at each scale and recipe, how it changes, and the gaps of the paper's Figure 1."""
    ours = leads(params, runs).query("question in ('lead', 'scale', 'recipe')").assign(source=HERE)
    paper = published.figure1(numbers).rename(columns={"lead": "mean"})
    paper = paper[paper["method"].isin(params.study.challengers) & (paper["baseline"] == params.study.baseline)]
    paper = paper.assign(question="published", source=f"{PAPER}, Figure 1, " + paper["kind"] + ": " + paper["source"]).drop(columns="kind")
    cells: Cells = {}
    data = [params.study.headline.data, *params.data]
    for row in sorted(records(ours), key=lambda row: data.index(row["data"])):
        place = (_place(params, row), row["recipe"], row["scale"], HERE)
        cells.setdefault(place, {})[f"{row['method']} minus {row['baseline']}"] = lead(row)
    for row in records(paper):
        place = (row["data"], "", scale(row["fraction"]), row["source"])
        cells.setdefault(place, {})[f"{row['method']} minus {row['baseline']}"] = number(100 * row["mean"], 2, sign=True)
    columns = [f"{name} minus {params.study.baseline}" for name in params.study.challengers if name != params.study.baseline]
    caption = (
        f"Lead over `{params.study.baseline}` in points of test top-1. {sure(params)} Rows with “minus” are the headline: how a lead "
        "changes from the small to the large scale, or from the weak to the strong recipe; positive means that it shrinks. All scales of a "
        f"data set see equally many images. {family(params)}, so they are stricter than the intervals. The paper publishes no intervals."
    )
    shown = spread(cells, ["data set", "recipe", "training images"], columns, "source")
    frame = pd.concat([ours, paper], ignore_index=True).astype({"n": "Int64"})
    title = f"Does the lead over {params.study.baseline} shrink with more data and a stronger recipe?"
    return Table("data_scale", title, caption, frame, shown)


def _place(params: Params, row: dict[str, Any]) -> str:
    """The data set's name, with the models only where the study has more than one pair of them for it."""
    pairs = {(item.teacher, item.student) for item in params.comparisons.values() if item.data == row["data"]}
    return str(row["data"]) if len(pairs) < 2 else f"{row['data']}: {row['teacher']} → {row['student']}"


def accuracies(params: Params, runs: pd.DataFrame) -> pd.DataFrame:
    """One row per comparison and method of it: where it stands, mean, low, high, n, seeds of test top-1 in [0, 1]."""
    rows = []
    for name in ordered(params):
        item = params.comparisons[name]
        where = {"comparison": name} | {key: getattr(item, key) for key in ("data", "recipe", "fraction", "teacher", "student")}
        where["train_images"] = train_images(runs, name)
        rows += [{**where, "method": method, **estimated(params, runs, name, method)} for method in item.methods]
    return pd.DataFrame(rows)


def recipes_table(params: Params, runs: pd.DataFrame, numbers: pd.DataFrame, teachers: pd.DataFrame) -> Table:
    """Every method under every recipe and scale, beside the paper's Table 1 and the published numbers of the recipes A1 and A2.

    A row of ``frame`` with a ``baseline`` is a difference, one without is an accuracy.
    """
    ahead = leads(params, runs).query("question == 'lead'").drop(columns=["question", "scale"])
    ours = pd.concat([accuracies(params, runs), ahead], ignore_index=True).assign(source=HERE)
    paper = pd.concat([published.table1(numbers), published.strategies(numbers)], ignore_index=True)
    paper = paper.assign(method=paper["method"].replace("student", alone(runs)))
    teacher = dict(zip(teachers["teacher"], teachers["test_top1"], strict=True))
    cells: Cells = {}
    for row in records(ours):
        place = (row["data"], row["recipe"], scale(row["fraction"], row["train_images"]), f"{row['teacher']} → {row['student']}", HERE)
        texts = cells.setdefault(place, {"teacher": number(100 * teacher[row["teacher"]]) if row["teacher"] in teacher else ""})
        against = row["baseline"]
        texts[row["method"] if pd.isna(against) else f"{row['method']} minus {against}"] = measured(row) if pd.isna(against) else lead(row)
    for _, part in paper.groupby(["data", "teacher", "student", "recipe", "epochs"], sort=False, dropna=False):
        row = records(part)[0]
        models, sources = f"{row['teacher']} → {row['student']}", "; ".join(dict.fromkeys(part["source"]))
        texts = {method: number(100 * value, 2) for method, value in zip(part["method"], part["mean"], strict=True)}
        cells[row["data"], published.how(row), scale(1.0), models, sources] = texts
    methods = [name for name in params.methods if name in set(ours["method"])]
    columns = ["teacher", *methods, *(f"{name} minus {params.study.baseline}" for name in params.study.challengers if name in methods)]
    shown = spread(cells, ["data set", "recipe", "training images", "teacher → student"], columns, "source")
    caption = (
        f"Test top-1 in percent, differences in points. {sure(params)} Verdicts as in the table data_scale. Published rows stand as "
        "printed; a cell that nobody measured or published is blank."
    )
    frame = pd.concat([ours, paper], ignore_index=True).astype({"n": "Int64", "epochs": "Int64"})
    return Table("recipes", "Methods under each recipe, beside the published numbers", caption, frame, shown)


def measures_table(params: Params, runs: pd.DataFrame) -> Table:
    """All six measures of the test split."""
    students = runs[~runs["trial"]]
    rows, cells = [], Cells()
    for name in ordered(params):
        for variant in dict.fromkeys(students.loc[students["comparison"] == name, "variant"]):
            for measure in collect.MEASURES:
                estimate = estimated(params, students, name, variant, f"test_{measure}")
                rows.append({"comparison": name, "method": variant, "measure": measure, **estimate})
                texts = cells.setdefault((name, params.comparisons[name].data, variant), {})
                texts[_UNITS[measure]] = measured(estimate, percent=measure not in _NATS)
    shown = spread(cells, ["comparison", "data set", "method"], _UNITS.values())
    caption = (
        f"On the test split, at the last epoch. {sure(params)} nll: negative log-likelihood; ece: expected calibration error; agreement: "
        "share of images on which student and teacher choose the same class; teacher_kl: KL of the student's answers from the teacher's."
    )
    return Table("measures", "All measures of every student", caption, pd.DataFrame(rows), shown)
