"""Real handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 (UCI optdigits, test part)."""

import numpy as np

from kdlib.config.schema import Digits
from kdlib.data.dataset import SPLITS, Content
from kdlib.data.splits import stratified_split


def contents(name: str, params: Digits) -> Content:
    """Split stratified by ``params.seed``. The 17 grey levels 0..16 become ``(255 v + 8) // 16``: 0..255, rounded half up."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes a second, which no other stage should pay)

    raw = load_digits()
    images = ((255 * raw.images.astype(np.int64) + 8) // 16).astype(np.uint8)[..., None]
    labels = raw.target.astype(np.int64)
    names, shares = [str(digit) for digit in range(10)], (params.val_fraction, params.test_fraction)
    index = dict(zip(SPLITS, stratified_split(labels, shares, params.seed, f"data.{name}", names), strict=True))
    return Content(names, 8, 1, {split: labels[index[split]] for split in SPLITS}, lambda split: iter([images[index[split]]]))
