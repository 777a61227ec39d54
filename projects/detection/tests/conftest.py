"""A study of seconds for all tests of detection, and detectors of a hundredth of the work."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from projects.detection.tests import shapes

torch.set_num_threads(1)  # as in tests/conftest.py


@pytest.fixture(autouse=True, scope="session")
def small_detectors() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        shapes.shrink(patched.setattr)
        yield


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study with one run, ``small``, that nobody has trained."""
    return shapes.write(tmp_path_factory.mktemp("shapes"))
