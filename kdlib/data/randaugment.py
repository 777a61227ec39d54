"""RandAugment on a batch of 8-bit images. Under construction: refuses to be switched on."""

from kdlib.config import RandAugmentParams
from kdlib.data.augment import Levels


def apply(images: Levels, params: RandAugmentParams) -> Levels:
    """Nothing yet."""
    if params.operations:
        raise NotImplementedError
    return images
