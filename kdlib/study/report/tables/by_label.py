"""The table of hard and soft labels (after the paper's Table 4): each loss on the hard label beside each method that all of them have."""

import pandas as pd

from kdlib.config.schema import Params
from kdlib.study.report.differences import hard_labels, in_all, leads, train_images
from kdlib.study.report.render import Table, lead, measured, records, scale
from kdlib.study.report.tables.comparisons import accuracies, family, stacked, sure

# binary losses are means over classes: a comparison at the same weight is one of form and scale together
MEANS = (
    "Binary losses (bce, and a binary soft label) are means over classes, the others sums: with C classes they count about C times less at "
    "the same weight, so a difference is one of form and of weight at once."
)


def label_tables(params: Params, runs: pd.DataFrame) -> list[Table]:
    """A table for each set of comparisons that differ in the hard label's loss alone; a row is a hard label, a column a method."""
    groups = hard_labels(params)
    return [_losses(params, runs, group, "losses" if group is groups[0] else f"losses_{next(iter(group.values()))}") for group in groups]


def _losses(params: Params, runs: pd.DataFrame, group: dict[str, str], name: str) -> Table:
    baseline, first = params.study.baseline, next(iter(group))
    item = params.comparisons[group[first]]
    methods, homes = in_all(params, group.values()), list(group.values())
    reached, everyone = accuracies(params, runs), leads(params, runs)
    reached = reached[reached["comparison"].isin(homes) & reached["method"].isin(methods)]
    ahead = everyone[(everyone["question"] == "lead") & everyone["comparison"].isin(homes) & everyone["method"].isin(methods)]
    pairs = {f"{comparison} minus {group[first]}": comparison for comparison in homes}
    changed = everyone[(everyone["question"] == "hard label") & everyone["comparison"].isin(pairs)]
    cells = {(row["comparison"], row["method"]): measured(row) or "diverged" for row in records(reached)}
    cells |= {(row["comparison"], f"{row['method']} minus {baseline}"): lead(row) for row in records(ahead)}
    cells |= {(pairs[row["comparison"]], f"{row['method']}: minus {first}"): lead(row) for row in records(changed)}
    heads = [*methods, *(f"{method} minus {baseline}" for method in methods if method in set(ahead["method"]))]
    heads += [f"{method}: minus {first}" for method in methods]
    rows = [[loss, *(cells.get((comparison, head), "") for head in heads)] for loss, comparison in group.items()]
    caption = (
        f"Test top-1 in percent, differences in points, on {item.data} ({scale(item.fraction, train_images(runs, group[first]))}, "
        f"{item.teacher} → {item.student}); columns: the method that gives the soft label. The recipes are {item.recipe} with another loss "
        f"on the hard label; its weight stays the same, as in the official commands. {MEANS} {sure(params)} “minus {first}”: the same "
        f"method with this hard label against the one with {first}. {family(params)}. Of the paper's own table no number is known here "
        "(results/published has none)."
    )
    frame = stacked({"accuracy": reached, "lead": ahead, "hard label": changed})
    shown = pd.DataFrame(rows, columns=["hard label", *heads])
    return Table(name, "Which loss on the hard label, beside which soft label?", caption, frame, shown)
