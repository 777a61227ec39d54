"""From the host to where images are."""

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor


def to_device(array: Shaped[np.ndarray, "..."], device: torch.device | str) -> Shaped[Tensor, "..."]:
    """The array on ``device``. On a GPU through pinned memory, and without waiting for what the device is still doing."""
    values = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
