"""Who leads whom, by how much, and how sure that is: every difference that the tables, the figures and the README speak of."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd

from kdlib.config.schema import Comparison, Params
from kdlib.study.report import stats
from kdlib.study.report.render import as_columns, scale

COLUMNS = [
    *("question", "data", "teacher", "student", "recipe", "scale", "fraction", "train_images", "comparison", "method", "baseline"),
    *("verdict", "mean", "low", "high", "n", "p_holm", "seeds"),
]
VERDICTS = ["question", "data", "comparison", "method", "baseline", "verdict", "lead", "low", "high", "n", "p_holm", "seeds"]
_ABOUT_LEADS = {"better": "shrinks", "worse": "grows", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class _Row:
    question: str  # lead | scale | recipe | hard label | tuning
    comparison: str
    recipe: str
    scale: str
    fraction: float
    method: str
    baseline: str
    values: stats.BySeed


def by_seed(runs: pd.DataFrame, comparison: str, variant: str, measure: str = "test_top1") -> stats.BySeed:
    """A measure of the finished runs, by seed. Diverged runs have none: they reduce n."""
    rows = runs[(runs["comparison"] == comparison) & (runs["variant"] == variant) & (runs["status"] == "finished")]
    return {int(seed): float(value) for seed, value in zip(rows["seed"], rows[measure], strict=True) if not pd.isna(value)}


def train_images(runs: pd.DataFrame, comparison: str) -> float:
    """How many training images the comparison's fraction is; NaN when it has no run."""
    counts = runs.loc[runs["comparison"] == comparison, "train_images"]
    return float(counts.iloc[0]) if len(counts) else math.nan


def same_setting(params: Params, comparison: str, method: str) -> str | None:
    """The comparison that trains ``method`` with its parameters of params.yaml on the same data, fraction, models and recipe."""
    wanted = params.comparisons[comparison]
    keys = ("data", "fraction", "teacher", "student", "recipe")
    for name, other in params.comparisons.items():
        if method in other.methods and all(getattr(other, key) == getattr(wanted, key) for key in keys):
            return name
    return None


def leads(params: Params, runs: pd.DataFrame) -> pd.DataFrame:
    """Every difference with its interval, paired by seed; in [-1, 1]. Columns as ``COLUMNS``. The questions:

    lead: a challenger minus the baseline. scale: its lead with the fewest images minus its lead with the most.
    recipe: its lead under the headline's first recipe minus under its second. hard label: a method under a recipe minus the same method
    under the recipe that differs in the hard label's loss alone. tuning: methods with the point that a sweep chose.
    Holm's correction is over a question's answers on one data set. Verdicts on scale and recipe say what the lead does: shrinks or grows.
    """
    makers = (_leads, _scales, _recipes, _hard_labels, _tunings)
    rows = [row for maker in makers for row in maker(params, runs)]
    frame = pd.DataFrame([_tell(row, params, runs) for row in rows], columns=COLUMNS)
    for members in frame.groupby(["question", "data"], sort=False).indices.values():
        answers = stats.holm_verdicts([stats.estimate(rows[i].values, params.study.confidence) for i in members], params.study.confidence)
        for i, (verdict, p) in zip(members, answers, strict=True):
            frame.loc[i, "p_holm"] = p
            if rows[i].values:  # a cell that nobody measured stays blank
                frame.loc[i, "verdict"] = _ABOUT_LEADS[verdict] if rows[i].question in ("scale", "recipe") else verdict
    return frame


def verdict_table(params: Params, runs: pd.DataFrame) -> pd.DataFrame:
    """results/verdicts.csv: what this study claims, and what another machine's run of it is compared with."""
    return leads(params, runs).rename(columns={"mean": "lead"})[VERDICTS]


def ordered(params: Params) -> list[str]:
    """The names of all comparisons: the headline's data set first, then by data set, models, recipe (in params.yaml's order), scale."""
    data = [params.study.headline.data, *params.data]

    def key(name: str) -> tuple[int, str, str, int, float]:
        item = params.comparisons[name]
        return data.index(item.data), item.teacher, item.student, list(params.recipes).index(item.recipe), item.fraction

    return sorted(params.comparisons, key=key)


def contests(params: Params) -> dict[tuple[str, str, str], dict[tuple[str, float], str]]:
    """(data, teacher, student) -> (recipe, fraction) -> the comparison that pits challengers against the baseline there."""
    settings: dict[tuple[str, str, str], dict[tuple[str, float], str]] = {}
    for name in ordered(params):
        item = params.comparisons[name]
        if params.study.baseline in item.methods and _challengers(params, item):
            settings.setdefault((item.data, item.teacher, item.student), {}).setdefault((item.recipe, item.fraction), name)
    return settings


def hard_labels(params: Params) -> list[dict[str, str]]:
    """Comparisons that differ in the hard label's loss alone: loss -> comparison, in params.yaml's order of the recipes."""
    groups: dict[tuple[object, ...], dict[str, str]] = {}
    for name in ordered(params):
        item = params.comparisons[name]
        recipe = params.recipes[item.recipe]
        rest = (item.data, item.teacher, item.student, item.fraction, recipe.model_dump_json(exclude={"hard_loss"}))
        if item.methods:
            groups.setdefault(rest, {}).setdefault(recipe.hard_loss, name)
    return [group for group in groups.values() if len(group) > 1]


def in_all(params: Params, comparisons: Iterable[str]) -> list[str]:
    """The methods that every one of these comparisons has, in params.yaml's order."""
    lists = [params.comparisons[name].methods for name in comparisons]
    return [method for method in params.methods if all(method in methods for methods in lists)]


def _tell(row: _Row, params: Params, runs: pd.DataFrame) -> dict[str, object]:
    first = row.comparison.split(" minus ")[0]
    item = params.comparisons[first]
    return {
        "data": item.data,
        "teacher": item.teacher,
        "student": item.student,
        "train_images": math.nan if math.isnan(row.fraction) else train_images(runs, first),
        **{key: value for key, value in vars(row).items() if key != "values"},
        **as_columns(stats.estimate(row.values, params.study.confidence)),
        "p_holm": math.nan,
        "verdict": "",
    }


def _challengers(params: Params, *items: Comparison) -> list[str]:
    return [name for name in params.study.challengers if name != params.study.baseline and all(name in item.methods for item in items)]


def _lead(runs: pd.DataFrame, comparison: str, method: str, baseline: str) -> stats.BySeed:
    return stats.paired_differences(by_seed(runs, comparison, method), by_seed(runs, comparison, baseline))


def _place(params: Params, runs: pd.DataFrame, comparison: str) -> tuple[str, str, float]:
    """Recipe, scale and fraction of a row about one comparison."""
    item = params.comparisons[comparison]
    return item.recipe, scale(item.fraction, train_images(runs, comparison)), item.fraction


def _leads(params: Params, runs: pd.DataFrame) -> Iterator[_Row]:
    baseline = params.study.baseline
    for places in contests(params).values():
        for name in places.values():
            for method in _challengers(params, params.comparisons[name]):
                yield _Row("lead", name, *_place(params, runs, name), method, baseline, _lead(runs, name, method, baseline))


def _change(params: Params, runs: pd.DataFrame, question: str, pair: tuple[str, str], place: tuple[str, str, float]) -> Iterator[_Row]:
    """How each challenger's lead in the first comparison of ``pair`` differs from its lead in the second."""
    baseline = params.study.baseline
    for method in _challengers(params, *(params.comparisons[name] for name in pair)):
        values = stats.paired_differences(*(_lead(runs, name, method, baseline) for name in pair))
        yield _Row(question, " minus ".join(pair), *place, method, baseline, values)


def _scales(params: Params, runs: pd.DataFrame) -> Iterator[_Row]:
    for places in contests(params).values():
        for recipe in dict.fromkeys(recipe for recipe, _ in places):
            fractions = [fraction for other, fraction in places if other == recipe]
            small, large = min(fractions), max(fractions)
            if small < large:
                pair = (places[recipe, small], places[recipe, large])
                yield from _change(params, runs, "scale", pair, (recipe, f"{100 * small:g} % minus {100 * large:g} %", math.nan))


def _recipes(params: Params, runs: pd.DataFrame) -> Iterator[_Row]:
    weak, strong = params.study.headline.recipes[0], params.study.headline.recipes[-1]
    for places in contests(params).values():
        for fraction in sorted({fraction for _, fraction in places}):
            if (weak, fraction) in places and (strong, fraction) in places and weak != strong:
                pair = (places[weak, fraction], places[strong, fraction])
                yield from _change(params, runs, "recipe", pair, (f"{weak} minus {strong}", *_place(params, runs, pair[0])[1:]))


def _hard_labels(params: Params, runs: pd.DataFrame) -> Iterator[_Row]:
    """Each method under the other losses minus under the first one: the same seeds saw the same batches."""
    for group in hard_labels(params):
        first, *others = group.values()
        for name in others:
            (new, shown, fraction), (old, _, _) = _place(params, runs, name), _place(params, runs, first)
            for method in in_all(params, group.values()):
                values = stats.paired_differences(by_seed(runs, name, method), by_seed(runs, first, method))
                yield _Row("hard label", f"{name} minus {first}", f"{new} minus {old}", shown, fraction, method, method, values)


def _tunings(params: Params, runs: pd.DataFrame) -> Iterator[_Row]:
    """Each tuned method minus the untuned baseline, and minus the tuned baseline: the same seeds saw the same batches."""
    baseline = params.study.baseline
    for name in ordered(params):
        item = params.comparisons[name]
        if item.sweep is None:
            continue
        place, untuned = _place(params, runs, name), same_setting(params, name, baseline)
        for method in item.sweep.grids:
            tuned = by_seed(runs, name, f"{method}_tuned")
            if untuned is not None:
                yield _Row(
                    "tuning", name, *place, f"{method}_tuned", baseline, stats.paired_differences(tuned, by_seed(runs, untuned, baseline))
                )
            if method != baseline and baseline in item.sweep.grids:
                against = by_seed(runs, name, f"{baseline}_tuned")
                yield _Row("tuning", name, *place, f"{method}_tuned", f"{baseline}_tuned", stats.paired_differences(tuned, against))
