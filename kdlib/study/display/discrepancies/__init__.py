"""Where published implementations disagree, with the definition or with each other: each one measured beside ours.

What others compute is re-created here in our own words, as small as it goes, from reading the repository or paper that is named.
"""

import pandas as pd

from kdlib.study.display.discrepancies import features, logits
from kdlib.study.display.discrepancies.base import Disagreement

DISAGREEMENTS = [one for module in (logits, features) for one in vars(module).values() if isinstance(one, Disagreement)]

__all__ = ["DISAGREEMENTS", "Disagreement", "table"]


def table() -> pd.DataFrame:
    """All of them, measured now: one row each."""
    rows = [(one.method, one.who, one.instead, one.measured, *one.pair()) for one in DISAGREEMENTS]
    frame = pd.DataFrame(rows, columns=["method", "who", "what they compute instead", "measured", "there", "here"])
    return frame.assign(difference=frame["there"] - frame["here"])
