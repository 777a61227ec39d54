"""Every published number beside what was measured of the comparisons that repeat it."""

import math
from typing import Any

import pandas as pd

from kdlib.config.schema import Params
from kdlib.errors import refuse
from kdlib.study.report import published, stats
from kdlib.study.report.differences import by_seed
from kdlib.study.report.render import Table, as_columns, measured, number, records
from kdlib.study.report.tables.comparisons import alone, sure

_SHARES = {"top1": "test_top1", "top1_gap_points": "test_top1", "top5": "test_top5"}  # in percent and points; measured as shares
_MINUS = "_minus_"  # a published lead: dkd_minus_kd


def reproduction_table(planned: Params, runs: pd.DataFrame, teachers: pd.DataFrame, numbers: pd.DataFrame) -> Table:
    """One row for each published number and comparison that repeats it, in the order of results/published/results.csv.

    Blank where nothing was measured. ``planned``: the whole study, with comparisons that were not made yet. A published number is met where
    it lies in the interval of ours; of one seed, and of assumed settings, nothing is said, nor where a method that the study does not have
    (masked image modelling, in the paper's Table 10) stands beside our baseline. Raises ``Refused`` for a comparison that repeats no row of
    the file.
    """
    users = _users(planned, numbers)
    rows = []
    for place, row in enumerate(records(numbers)):
        for name in users.get(place, [""]):
            settings = planned.study.published[name].settings if name else ""
            method = _method(planned, runs, row)
            estimate = stats.estimate(_ours(planned, runs, teachers, name, {**row, "method": method}), planned.study.confidence)
            gap = estimate.mean - row["value"] / 100 if row["metric"] in _SHARES else math.nan
            verdict = _verdict(estimate, row, settings) if method in (row["method"], alone(runs)) else ""
            rows.append({**row, "comparison": name, "settings": settings, "gap": gap, "verdict": verdict, **as_columns(estimate)})
    frame = pd.DataFrame(rows).astype({"n": "Int64"})
    caption = (
        f"Percent, differences in points; published numbers as printed. {sure(planned)} A method that was not trained here stands beside "
        f"`{planned.study.baseline}`. Met: the published number lies in our interval; of one seed, and where no public source gives all "
        "settings (assumed), nothing is said. Blank: not measured."
    )
    return Table("published", "Published numbers beside measured ones", caption, frame, pd.DataFrame([_shown(row) for row in rows]))


def _users(planned: Params, numbers: pd.DataFrame) -> dict[int, list[str]]:
    """Which comparisons repeat a row of the file, by the row's place."""
    users: dict[int, list[str]] = {}
    rows = [{column: str(value) for column, value in row.items()} for row in records(numbers)]
    for name, asked in ((name, asked) for name, item in planned.study.published.items() for asked in item.rows):
        wanted = {**asked.where, "table": asked.table}.items()
        places = [place for place, row in enumerate(rows) if wanted <= row.items()]
        if not places:
            columns = ", ".join(f"{column} {value}" for column, value in asked.where.items())
            allowed = f"rows of {published.FILE}"
            raise refuse(f"study.published.{name}", f"{asked.table} with {columns}", allowed, "correct it, or remove it")
        for place in places:
            users.setdefault(place, []).append(name)
    return users


def _method(planned: Params, runs: pd.DataFrame, row: dict[str, Any]) -> str:
    """What of ours stands beside a published row, in the file's terms."""
    if row["method"] == "student":
        return alone(runs)
    return str(row["method"]) if set(row["method"].split(_MINUS)) <= {"teacher", *planned.methods} else planned.study.baseline


def _ours(planned: Params, runs: pd.DataFrame, teachers: pd.DataFrame, name: str, row: dict[str, Any]) -> stats.BySeed:
    """What was measured of it, by seed."""
    if row["method"] == "teacher":
        return _teacher(planned, teachers, name, row)
    if not name or row["metric"] not in _SHARES:
        return {}
    method, _, against = row["method"].partition(_MINUS)
    ours, theirs = (by_seed(runs, name, each, _SHARES[row["metric"]]) for each in (method, against))
    return stats.paired_differences(ours, theirs) if against else ours


def _teacher(planned: Params, teachers: pd.DataFrame, name: str, row: dict[str, Any]) -> stats.BySeed:
    """Of the comparison's teacher, or of the first whose model the row names."""
    models = {key: item.model for key, item in planned.teachers.items()}
    wanted = planned.comparisons[name].teacher if name else next((key for key, model in models.items() if model == row["teacher"]), "")
    top1 = dict(zip(teachers["teacher"], teachers["test_top1"], strict=True))
    return {planned.teachers[wanted].seed: float(top1[wanted])} if wanted in top1 else {}


def _verdict(estimate: stats.Estimate, row: dict[str, Any], settings: str) -> str:
    if settings == "assumed":
        return "assumed settings"
    if math.isnan(estimate.low):
        return ""
    return "met" if estimate.low <= row["value"] / 100 <= estimate.high else "above" if row["value"] / 100 < estimate.low else "below"


def _shown(row: dict[str, Any]) -> dict[str, str]:
    return {
        "table": row["table"],
        "data set": row["dataset"],
        "teacher → student": " → ".join(str(row[key]) for key in ("teacher", "student") if not pd.isna(row[key])),
        "recipe": published.how(row),
        "method": str(row["method"]).replace(_MINUS, " minus "),
        "measure": str(row["metric"]).replace("_gap_points", ""),
        "published": number(row["value"], 2, sign=_MINUS in str(row["method"])),
        "measured here": measured(row, sign=_MINUS in str(row["method"])),
        "measured minus published": number(100 * row["gap"], 1, sign=True),
        "": row["verdict"],
        "comparison": row["comparison"],
        "source": f"{row['kind']}: {row['source']}",
    }
