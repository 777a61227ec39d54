"""The part of README.md that the pipeline writes: no number in it is typed by hand."""

import math
from typing import Any

import pandas as pd

from kdlib.config import Refused, Study
from kdlib.tables.comparisons import data_scale
from kdlib.tables.leads import leads
from kdlib.tables.render import number, pipe, records

_SUBJECT = {"scale": "with more data", "recipe": "under the stronger recipe"}


def readme_block(study: Study, runs: pd.DataFrame, published: pd.DataFrame, figure: str) -> str:
    """Answers, figure (a path as README links it) and the data scale table, as Markdown."""
    table = data_scale(study, runs, published)
    seeds = ", ".join(map(str, study.study.seeds))
    how = f"seeds {seeds}; points of test top-1 with {100 * study.study.confidence:g} % t intervals paired by seed"
    lines = [f"On {study.study.headline.data} ({how}):", "", *answers(study, runs)]
    return "\n\n".join(["\n".join(lines), f"![{table.title}]({figure})", pipe(table.shown), table.caption])


def answers(study: Study, runs: pd.DataFrame) -> list[str]:
    """One sentence per question and challenger on the headline's data set, with the numbers behind it."""
    everyone = leads(study, runs)
    rows = records(everyone[everyone["data"] == study.study.headline.data])
    leading = {(row["comparison"], row["method"]): row for row in rows if row["question"] == "lead"}
    return [_change(row, leading) if row["question"] in _SUBJECT else _pair(row) for row in rows if row["question"] != "lead"]


def _change(row: dict[str, Any], leading: dict[tuple[str, str], dict[str, Any]]) -> str:
    steps = " → ".join(_points(leading[name, row["method"]]) for name in row["comparison"].split(" minus "))
    where = f"recipe {row['recipe']}, {row['scale']}".replace(" minus ", " → ")
    subject = _SUBJECT[row["question"]]
    answer = f"**inconclusive** whether it changes {subject}" if row["verdict"] == "inconclusive" else f"it **{row['verdict']}** {subject}"
    return f"- {where}: {row['method']}'s lead over {row['baseline']} {steps}: {_last(row, answer)}"


def _pair(row: dict[str, Any]) -> str:
    return (
        f"- recipe {row['recipe']}, {row['scale']}: {row['method']} against {row['baseline']}: {_last(row, '**' + row['verdict'] + '**')}"
    )


def _last(row: dict[str, Any], answer: str) -> str:
    return f"{answer} (difference {_points(row)}, n={row['n']})." if row["n"] else "not measured."


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
    found = (text.count(begin), text.count(end))
    if found != (1, 1) or text.index(begin) > text.index(end):
        raise Refused(f"README.md: found {found[0]} x {begin} and {found[1]} x {end}; allowed: each once, in this order; put them back")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{block.strip()}\n\n{end}{rest.split(end)[1]}"
