"""The part of README.md that the pipeline writes: no number in it is typed by hand."""

import math
from typing import Any

import pandas as pd

from kdlib.config.schema import Params
from kdlib.errors import Refused
from kdlib.study.report.differences import leads
from kdlib.study.report.render import Table, number, pipe, records
from kdlib.study.report.tables.by_method import by_scale, ends

_SUBJECT = {"scale": "with more data", "recipe": "under the stronger recipe"}


def readme_block(params: Params, sentences: list[str], table: Table, figure: str | None) -> str:
    """What was found on the headline's data set, figure (a path as README links it) and table, as Markdown."""
    seeds = ", ".join(map(str, params.study.seeds))
    how = f"seeds {seeds}; points of test top-1 with {100 * params.study.confidence:g} % t intervals paired by seed"
    lines = [f"On {params.study.headline.data} ({how}):", "", *sentences]
    return "\n\n".join(["\n".join(lines), *([f"![{table.title}]({figure})"] if figure else []), pipe(table.shown), table.caption])


def changes(params: Params, runs: pd.DataFrame) -> list[str]:
    """A sentence for each challenger: how its lead changes with the scale and with the recipe."""
    rows = _on_headline(params, runs)
    leading = {(row["comparison"], row["method"]): row for row in rows if row["question"] == "lead"}
    return [_change(row, leading) for row in rows if row["question"] in _SUBJECT]


def tuned(params: Params, runs: pd.DataFrame) -> list[str]:
    """A sentence for each pair that the tuning table is about."""
    return [
        f"- recipe {row['recipe']}, {row['scale']}: {row['method']} against {row['baseline']}: {_last(row)}"
        for row in _on_headline(params, runs)
        if row["question"] == "tuning"
    ]


def ranked(params: Params, runs: pd.DataFrame) -> list[str]:
    """A sentence for each scale, who is better than the baseline and who is worse; and one for what becomes of the leads."""
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in _on_headline(params, runs):
        answers.setdefault((row["question"], row["comparison"]), []).append(row)
    sentences = []
    for names in by_scale(params):
        recipe, baseline = params.comparisons[names[0]].recipe, params.study.baseline
        for leading in (answers["lead", name] for name in names):
            verdicts = _by_verdict(leading, ("better", "worse", "inconclusive"))
            sentences.append(f"- recipe {recipe}, {leading[0]['scale']}, against {baseline}: {verdicts}.")
        if changing := answers.get(("scale", f"{names[0]} minus {names[-1]}")):
            where = f"recipe {recipe}, {ends(params, names)}".replace(" minus ", " → ")
            sentences.append(f"- {where}, the lead over {baseline}: {_by_verdict(changing, ('shrinks', 'grows', 'inconclusive'))}.")
    return sentences


def labelled(params: Params, runs: pd.DataFrame) -> list[str]:
    """A sentence for each method and each hard label beside the first."""
    sentences = []
    for row in _on_headline(params, runs):
        if row["question"] == "hard label":
            new, old = (params.recipes[recipe].hard_loss for recipe in row["recipe"].split(" minus "))
            sentences.append(f"- {row['method']}, {row['scale']}: hard label {new} against {old}: {_last(row)}")
    return sentences


def _on_headline(params: Params, runs: pd.DataFrame) -> list[dict[str, Any]]:
    everyone = leads(params, runs)
    return records(everyone[everyone["data"] == params.study.headline.data])


def _by_verdict(rows: list[dict[str, Any]], order: tuple[str, ...]) -> str:
    """Methods by verdict, the furthest ahead first; ``diverged`` for those without one, of which no seed's loss stayed finite."""
    methods: dict[str, list[str]] = {verdict: [] for verdict in (*order, "")}
    for row in sorted(rows, key=lambda row: -row["mean"] if row["n"] else 0.0):
        methods[row["verdict"]].append(row["method"])
    return "; ".join(f"**{verdict or 'diverged'}** {', '.join(names)}" for verdict, names in methods.items() if names)


def _change(row: dict[str, Any], leading: dict[tuple[str, str], dict[str, Any]]) -> str:
    steps = " → ".join(_points(leading[name, row["method"]]) for name in row["comparison"].split(" minus "))
    where = f"recipe {row['recipe']}, {row['scale']}".replace(" minus ", " → ")
    subject = _SUBJECT[row["question"]]
    answer = f"**inconclusive** whether it changes {subject}" if row["verdict"] == "inconclusive" else f"it **{row['verdict']}** {subject}"
    return f"- {where}: {row['method']}'s lead over {row['baseline']} {steps}: {_last(row, answer)}"


def _last(row: dict[str, Any], answer: str | None = None) -> str:
    """The end of a sentence: the answer (None: the verdict) with its difference."""
    return f"{answer or '**' + row['verdict'] + '**'} (difference {_points(row)}, n={row['n']})." if row["n"] else "diverged."


def _points(row: dict[str, Any]) -> str:
    """``+1.5 [+0.2, +2.8]``; a dash when nothing was measured."""
    if row["n"] == 0:
        return "-"
    ends = "" if math.isnan(row["low"]) else f" [{number(100 * row['low'], sign=True)}, {number(100 * row['high'], sign=True)}]"
    return number(100 * row["mean"], sign=True) + ends


def insert_between_markers(text: str, block: str, name: str) -> str:
    """``text`` with ``block`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises ``Refused`` unless each marker is there once, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    counts = (text.count(begin), text.count(end))
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise Refused(f"README.md: found {counts[0]} x {begin} and {counts[1]} x {end}; allowed: each once, in this order; put them back")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{block.strip()}\n\n{end}{rest.split(end)[1]}"
