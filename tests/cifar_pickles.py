"""CIFAR-100's python version, small, as torchvision reads it: it knows the real one by MD5."""

import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

Part = tuple[np.ndarray, list[int]]  # rows of 3 x 32 x 32 levels, and their labels


def write(root: Path, names: Sequence[str], parts: Mapping[str, Part], patched: pytest.MonkeyPatch) -> Path:
    """``parts``: of train and test. torchvision takes them for the real ones as long as ``patched`` lasts; returns ``root``."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    contents = {file: {"data": rows, "fine_labels": labels, "coarse_labels": labels} for file, (rows, labels) in parts.items()}
    md5 = {}
    for file, content in {**contents, "meta": {"fine_label_names": list(names)}}.items():
        written = pickle.dumps(content)
        (folder / file).write_bytes(written)
        md5[file] = hashlib.md5(written).hexdigest()
    patched.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    patched.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    patched.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5["meta"]})
    return root
