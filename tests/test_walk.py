"""How far a reader has to walk who follows one batch through kdlib to its first gradient."""

import importlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES, RETURNS = 46, 31  # as many as there were; fewer is better


def test_a_batch_passes_few_files_and_seldom_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    walk = importlib.import_module("walk")
    # in a fresh process: what another test has cached here would not be called again, and its profiler stays as it is
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        read = walk.path(pool.submit(walk.traced).result())
    files = len(set(read))
    assert files <= FILES, read
    assert len(read) - files <= RETURNS, read
