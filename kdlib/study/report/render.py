"""A table and its three forms: Markdown and LaTeX for people (percent), CSV for programs (fractions). Same input, same bytes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.files import write_csv, write_text
from kdlib.study.report import stats

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
Cells = dict[tuple[str, ...], dict[str, str]]  # of a row's place the texts of its columns
_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": "", "|": r"$|$", "<": "$<$", ">": "$>$"}
    | {"±": r"$\pm$", MINUS: "$-$", TIMES: r"$\times$", "≈": r"$\approx$", "→": r"$\to$"}
)


@dataclass(frozen=True)
class Table:
    """``frame`` is tidy: one number per row, accuracies in [0, 1]. ``shown`` is what a person reads: text, in percent and points."""

    name: str
    title: str
    caption: str
    frame: pd.DataFrame
    shown: pd.DataFrame


def markdown(table: Table) -> str:
    """Title, caption and the shown table, as GitHub renders it."""
    return f"### {table.title}\n\n{pipe(table.shown)}\n\n{table.caption}\n"


def pipe(shown: pd.DataFrame) -> str:
    """The bare Markdown table, its columns aligned for those who read the source."""
    rows = [[str(cell).replace("|", r"\|") for cell in row] for row in [list(shown.columns), *shown.itertuples(index=False)]]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(shown.columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def latex(table: Table) -> str:
    """A table environment, shrunk to the width of the text where it is wider; needs the packages booktabs and graphicx."""
    rows = [" & ".join(str(cell).translate(_LATEX) for cell in row) + r" \\" for row in table.shown.itertuples(index=False)]
    head = " & ".join(str(column).translate(_LATEX) for column in table.shown.columns) + r" \\"
    caption = f"{table.title}. {table.caption}".translate(_LATEX)
    lines = [r"\begin{table}", r"\centering", r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.shown.columns)}}}", r"\toprule", head, r"\midrule", *rows]
    lines += [r"\bottomrule", r"\end{tabular}}", rf"\caption{{{caption}}}", rf"\label{{tab:{table.name}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def write_table(table: Table, folder: Path) -> None:
    """``folder/<name>.md``, ``.csv`` and ``.tex``, each whole or not at all."""
    write_text(folder / f"{table.name}.md", markdown(table))
    write_text(folder / f"{table.name}.tex", latex(table))
    write_csv(folder / f"{table.name}.csv", table.frame)


def spread(cells: Cells, heads: list[str], columns: Iterable[str], *tail: str) -> pd.DataFrame:
    """A row for each place of ``cells``: its parts under ``heads`` and ``tail``, in between its texts under ``columns``, or blanks."""
    frame = pd.DataFrame(list(cells.values()), columns=list(columns), dtype="object").fillna("")
    places = pd.DataFrame(list(cells), columns=[*heads, *tail])
    return pd.concat([places[heads], frame, places[list(tail)]], axis=1)


def number(value: float, digits: int = 1, *, sign: bool = False) -> str:
    """``value`` as text with a real minus sign; blank when there is none."""
    if math.isnan(value):
        return ""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows, each by column name."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def as_columns(estimate: stats.Estimate) -> dict[str, object]:
    """An estimate as columns of a tidy frame."""
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high, "n": estimate.n, "seeds": " ".join(map(str, estimate.seeds))}


def measured(row: Mapping[str, Any], *, percent: bool = True, sign: bool = False) -> str:
    """``mean ± half width (n=3)`` of a row with mean, low, high, n; blank when nothing was measured, no ± without an interval."""
    if row["n"] == 0:
        return ""
    factor, digits = (100, 1) if percent else (1, 3)
    half = "" if math.isnan(row["low"]) else f" ± {number(factor * (row['high'] - row['low']) / 2, digits)}"
    return f"{number(factor * row['mean'], digits, sign=sign)}{half} (n={row['n']})"


def lead(row: Mapping[str, Any]) -> str:
    """A difference in points with its verdict; blank when nothing was measured."""
    return f"{measured(row, sign=True)} {row['verdict']}".strip()


def scale(fraction: float, train_images: float = math.nan) -> str:
    """``10 % (1000 images)``; without the count where it is unknown."""
    return f"{100 * fraction:g} %" + ("" if math.isnan(train_images) else f" ({train_images:.0f} images)")
