"""Measured detectors beside the published ones (after the paper's Table 11)."""

import math
from pathlib import Path

import pandas as pd

from kdlib.errors import Refused
from kdlib.files import read_json
from kdlib.study.report import published
from kdlib.study.report.render import Table, markdown, number, records, write_table
from projects.detection.settings import Params, Run

MEASURES = ("box_ap", "mask_ap")
TITLE = "What does a distilled backbone bring to object detection?"
DIFFERENCES = (
    "Published detectors were trained by mmdetection 2, these by torchvision's parts with the same settings. What differs: RoIAlign takes "
    "2 x 2 points of a bin, without the shift by half a pixel, where mmdetection aligns and lets the size decide; box losses of Mask R-CNN "
    "and of its proposals are smooth L1 with beta 1/9, not L1; batches are not sorted by the shape of images, and what does not fill the "
    "last one is left out; images are resized on the device; the classifier's normalisation is that of its timm model; initial values "
    "of pyramid and heads are torchvision's; ConvNeXtV2's response normalisation is free of weight decay. The cascade's boxes are the same "
    "for all classes, where ConvNeXt's official configuration has boxes for each class."
)


def check(root: Path) -> None:
    """Raise ``Refused`` where no published numbers are at hand."""
    try:
        published.read_published(root)
    except FileNotFoundError as error:
        do = "put the folder into this repository, or copy the file beside it"
        raise Refused(f"--folder: found {root}, which has no {published.FILE} at or above it; allowed: a folder that has; {do}") from error


def compare(root: Path, params: Params, runs: Path) -> Table:
    """Tabulate each published detector beside the runs that name it in ``beside``; blank where nothing was measured."""
    theirs = published.read_published(root)
    theirs = theirs[theirs["table"] == "table11_coco"].assign(published=lambda rows: rows["value"] / 100)
    keys = ["student", "recipe", "metric"]
    rows = [row for name, run in params.runs.items() for row in _measured(root / runs / name, run, params)]
    ours = pd.DataFrame(rows).astype({"measured": "float64"})
    frame = theirs[[*keys, "epochs", "published"]].merge(ours, on=keys, how="outer", sort=False)
    frame = frame.assign(difference=frame["measured"] - frame["published"])
    columns = ["student", "recipe", "epochs", "run", "settings", "metric", "published", "measured", "difference"]
    frame = frame[columns].fillna({"run": "", "settings": ""}).sort_values(["student", "recipe", "run"], kind="stable", ignore_index=True)
    return Table("table11_coco", TITLE, _caption(frame), frame, _shown(frame))


def _measured(folder: Path, run: Run, params: Params) -> list[dict[str, object]]:
    """The rows of a run, one per measure; NaN where it was not measured."""
    file = folder / "metrics.json"
    metrics = read_json(file) if file.is_file() else {}
    row = {"student": run.model.partition(".")[0], "recipe": run.beside, "run": folder.name}
    row["settings"] = params.recipes[run.recipe].settings
    return [{**row, "metric": name, "measured": metrics.get(name, math.nan)} for name in MEASURES]


def write(root: Path, params: Params, runs: Path) -> str:
    """Write results/tables/table11_coco.md, .csv and .tex below ``root``; returns the Markdown."""
    table = compare(root, params, runs)
    write_table(table, root / "results" / "tables")
    return markdown(table)


def _shown(frame: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for (student, recipe, run), rows in frame.groupby(["student", "recipe", "run"], sort=False):
        line = {"backbone": student, "recipe": recipe, "run": run, "settings": rows["settings"].iloc[0]}
        for row in records(rows):
            name = str(row["metric"]).replace("_ap", " AP")
            line |= {f"{name}, published": number(100 * row["published"]), f"{name}, measured": number(100 * row["measured"])}
            line[f"{name}, difference"] = number(100 * row["difference"], sign=True) if row["settings"] == "verified" else ""
        lines.append(line)
    return pd.DataFrame(lines)


def _caption(frame: pd.DataFrame) -> str:
    assumed = sorted(set(frame.loc[frame["settings"] == "assumed", "run"]))
    note = f"Assumed settings, so no difference is given: {', '.join(assumed)}. " if assumed else ""
    return f"Average precision in percent, mean over IoU .50 to .95, on the validation images; one seed, no interval. {note}{DIFFERENCES}"
