"""Who leads whom, by how much, and how sure that is: every difference that the tables, the figures and the README speak of."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import pandas as pd

from kdlib.config.schema import Params, Sweep
from kdlib.study.report import stats
from kdlib.study.report.render import as_columns, scale

COLUMNS = [
    *("question", "data", "teacher", "student", "recipe", "scale", "fraction", "train_images", "comparison", "method", "baseline"),
    *("verdict", "mean", "low", "high", "n", "p_holm", "seeds"),
]
VERDICTS = ["question", "data", "comparison", "method", "baseline", "verdict", "lead", "low", "high", "n", "p_holm", "seeds"]
_ABOUT_LEADS = {"better": "shrinks", "worse": "grows", "inconclusive": "inconclusive"}


@dataclass(frozen=True)
class _Answer:
    question: str  # lead | scale | recipe | hard label | tuning
    comparisons: tuple[str, ...]  # one, or the two that it is the difference of
    method: str
    baseline: str
    values: stats.BySeed


def by_seed(runs: pd.DataFrame, comparison: str, variant: str, measure: str = "test_top1") -> stats.BySeed:
    """A measure of the finished runs, by seed. Diverged runs have none: they reduce n."""
    rows = runs[(runs["comparison"] == comparison) & (runs["variant"] == variant) & (runs["status"] == "finished")]
    return {int(seed): float(value) for seed, value in zip(rows["seed"], rows[measure], strict=True) if not pd.isna(value)}


def estimated(params: Params, runs: pd.DataFrame, comparison: str, variant: str, measure: str = "test_top1") -> dict[str, object]:
    """Mean, interval, n and seeds of a measure, as columns of a tidy frame."""
    return as_columns(stats.estimate(by_seed(runs, comparison, variant, measure), params.study.confidence))


def train_images(runs: pd.DataFrame, comparison: str) -> float:
    """How many training images the comparison's fraction is; NaN when it has no run."""
    counts = runs.loc[runs["comparison"] == comparison, "train_images"]
    return float(counts.iloc[0]) if len(counts) else math.nan


def same_setting(params: Params, comparison: str, method: str) -> str | None:
    """The comparison that trains ``method`` with its parameters of params.yaml on the same data, fraction, models and recipe."""
    wanted, keys = params.comparisons[comparison], ("data", "fraction", "teacher", "student", "recipe")
    others = ((name, item) for name, item in params.comparisons.items() if method in item.methods)
    return next((name for name, item in others if all(getattr(item, key) == getattr(wanted, key) for key in keys)), None)


def leads(params: Params, runs: pd.DataFrame) -> pd.DataFrame:
    """Every difference with its interval, paired by seed; in [-1, 1]. Columns as ``COLUMNS``. The questions:

    lead: a challenger minus the baseline. scale: its lead with the fewest images minus its lead with the most.
    recipe: its lead under the headline's first recipe minus under its second. hard label: a method under a recipe minus the same method
    under the recipe that differs in the hard label's loss alone. tuning: methods with the point that a sweep chose.
    Holm's correction is over a question's answers on one data set. Verdicts on scale and recipe say what the lead does: shrinks or grows.
    """
    answers = [answer for ask in (_leads, _scales, _recipes, _hard_labels, _tunings) for answer in ask(params, runs)]
    estimates = [stats.estimate(answer.values, params.study.confidence) for answer in answers]
    rows = [_about(params, runs, answer) | as_columns(estimate) for answer, estimate in zip(answers, estimates, strict=True)]
    frame = pd.DataFrame(rows, columns=COLUMNS).assign(p_holm=math.nan, verdict="")
    for members in frame.groupby(["question", "data"], sort=False).indices.values():
        verdicts = stats.holm_verdicts([estimates[i] for i in members], params.study.confidence)
        for i, (verdict, p) in zip(members, verdicts, strict=True):
            frame.loc[i, "p_holm"] = p
            if answers[i].values:  # a cell that nobody measured stays blank
                frame.loc[i, "verdict"] = _ABOUT_LEADS[verdict] if answers[i].question in ("scale", "recipe") else verdict
    return frame


def verdict_table(params: Params, runs: pd.DataFrame) -> pd.DataFrame:
    """results/verdicts.csv: what this study claims, and what another machine's run of it is compared with."""
    return leads(params, runs).rename(columns={"mean": "lead"})[VERDICTS]


def ordered(params: Params) -> list[str]:
    """The names of all comparisons: the headline's data set first, then by data set, models, recipe (in params.yaml's order), scale."""
    data, recipes = [params.study.headline.data, *params.data], list(params.recipes)
    keys = {
        name: (data.index(item.data), item.teacher, item.student, recipes.index(item.recipe), item.fraction)
        for name, item in params.comparisons.items()
    }
    return sorted(keys, key=lambda name: keys[name])


def sweeps(params: Params) -> dict[str, Sweep]:
    """The comparisons that tune, with what they try."""
    return {name: sweep for name in ordered(params) if (sweep := params.comparisons[name].sweep) is not None}


def contests(params: Params) -> dict[tuple[str, str, str], dict[str, dict[float, str]]]:
    """(data, teacher, student) -> recipe -> fraction, from the smallest -> the comparison of challengers with the baseline there."""
    settings: dict[tuple[str, str, str], dict[str, dict[float, str]]] = {}
    for name in ordered(params):
        item = params.comparisons[name]
        if params.study.baseline in item.methods and _challengers(params, name):
            settings.setdefault((item.data, item.teacher, item.student), {}).setdefault(item.recipe, {}).setdefault(item.fraction, name)
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


def in_all(params: Params, comparisons: Collection[str]) -> list[str]:
    """The methods that every one of these comparisons has, in params.yaml's order."""
    return [method for method in params.methods if all(method in params.comparisons[name].methods for name in comparisons)]


def _about(params: Params, runs: pd.DataFrame, answer: _Answer) -> dict[str, object]:
    """What is compared where; of two comparisons both recipes, or both scales, where these differ."""
    items = [params.comparisons[name] for name in answer.comparisons]
    fraction, *others = dict.fromkeys(item.fraction for item in items)
    images = math.nan if others else train_images(runs, answer.comparisons[0])
    return {
        **{key: getattr(answer, key) for key in ("question", "method", "baseline")},
        **{key: getattr(items[0], key) for key in ("data", "teacher", "student")},
        "comparison": " minus ".join(answer.comparisons),
        "recipe": " minus ".join(dict.fromkeys(item.recipe for item in items)),
        "scale": " minus ".join(scale(each, images) for each in (fraction, *others)),
        "fraction": math.nan if others else fraction,
        "train_images": images,
    }


def _challengers(params: Params, *comparisons: str) -> list[str]:
    return [name for name in params.study.challengers if name != params.study.baseline and name in in_all(params, comparisons)]


def _lead(params: Params, runs: pd.DataFrame, comparison: str, method: str) -> stats.BySeed:
    return stats.paired_differences(by_seed(runs, comparison, method), by_seed(runs, comparison, params.study.baseline))


def _leads(params: Params, runs: pd.DataFrame) -> Iterator[_Answer]:
    for name in (name for places in contests(params).values() for scales in places.values() for name in scales.values()):
        for method in _challengers(params, name):
            yield _Answer("lead", (name,), method, params.study.baseline, _lead(params, runs, name, method))


def _changes(params: Params, runs: pd.DataFrame, question: str, pair: tuple[str, str]) -> Iterator[_Answer]:
    """How each challenger's lead in the first comparison of ``pair`` differs from its lead in the second."""
    for method in _challengers(params, *pair):
        values = stats.paired_differences(*(_lead(params, runs, name, method) for name in pair))
        yield _Answer(question, pair, method, params.study.baseline, values)


def _scales(params: Params, runs: pd.DataFrame) -> Iterator[_Answer]:
    for names in (list(scales.values()) for places in contests(params).values() for scales in places.values()):
        if len(names) > 1:
            yield from _changes(params, runs, "scale", (names[0], names[-1]))


def _recipes(params: Params, runs: pd.DataFrame) -> Iterator[_Answer]:
    weak, strong = params.study.headline.recipes[0], params.study.headline.recipes[-1]
    for places in contests(params).values():
        for fraction, name in places.get(weak, {}).items():
            if weak != strong and fraction in places.get(strong, {}):
                yield from _changes(params, runs, "recipe", (name, places[strong][fraction]))


def _hard_labels(params: Params, runs: pd.DataFrame) -> Iterator[_Answer]:
    """Each method under the other losses minus under the first one: the same seeds saw the same batches."""
    for group in hard_labels(params):
        first, *others = group.values()
        for name in others:
            for method in in_all(params, group.values()):
                values = stats.paired_differences(by_seed(runs, name, method), by_seed(runs, first, method))
                yield _Answer("hard label", (name, first), method, method, values)


def _tunings(params: Params, runs: pd.DataFrame) -> Iterator[_Answer]:
    """Each tuned method minus the untuned baseline, and minus the tuned baseline: the same seeds saw the same batches."""
    baseline = params.study.baseline
    for name, sweep in sweeps(params).items():
        untuned = same_setting(params, name, baseline)
        for method in sweep.grids:
            against = {} if untuned is None else {baseline: untuned}
            if method != baseline and baseline in sweep.grids:
                against[f"{baseline}_tuned"] = name
            for other, home in against.items():
                values = stats.paired_differences(by_seed(runs, name, f"{method}_tuned"), by_seed(runs, home, other))
                yield _Answer("tuning", (name,), f"{method}_tuned", other, values)
