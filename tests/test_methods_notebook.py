"""methods.ipynb as a person runs it, and what it shows: every registered method, and disagreements that do disagree."""

import math
import re

import nbclient
import nbformat
import pytest
import torch
from torch.testing import assert_close

from kdlib import config
from kdlib.losses import METHODS
from kdlib.study.display import methods
from kdlib.study.display.discrepancies import DISAGREEMENTS, table
from kdlib.study.display.discrepancies.base import Disagreement
from kdlib.types import Feature
from tests import tiny

NOTEBOOK = tiny.ROOT / "notebooks" / "methods.ipynb"
PARAMETERS = config.load(tiny.ROOT).methods
every_method = pytest.mark.parametrize("name", list(METHODS))


@pytest.fixture(scope="module")
def outputs() -> list[nbformat.NotebookNode]:
    """Of all cells after Run All, in order."""
    notebook = nbformat.read(NOTEBOOK, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tiny.ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        nbclient.execute(notebook, cwd=str(NOTEBOOK.parent), allow_errors=True, timeout=200, kernel_name="python3")
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_run_all_ends_without_an_error_or_a_warning(outputs: list[nbformat.NotebookNode]) -> None:
    assert [output.get("evalue") or output.get("text") for output in outputs if output.output_type in ("error", "stream")] == []


def test_every_method_is_shown_with_card_terms_and_figure(outputs: list[nbformat.NotebookNode]) -> None:
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert [next(kind for kind in data if kind != "text/plain") for data in shown] == ["text/markdown", "text/html", "image/png"] * len(
        METHODS
    )
    cards = [data["text/markdown"] for data in shown[::3]]
    for card, (name, method) in zip(cards, METHODS.items(), strict=True):
        assert card.startswith(f"## {name}\n")
        assert f"$${method.equation}$$" in card
        assert methods.paper(name) in card
        assert re.search(r"(19|20)\d\d|arXiv", methods.paper(name)) or not method.asks_teacher


def test_every_disagreement_is_shown(outputs: list[nbformat.NotebookNode]) -> None:
    html = outputs[-1].data["text/html"]
    assert html.count("<tr>") == 1 + len(DISAGREEMENTS)


@pytest.mark.parametrize("one", DISAGREEMENTS, ids=lambda one: f"{one.method}: {one.instead[:40]}")
def test_a_disagreement_disagrees(one: Disagreement) -> None:
    there, here = one.pair()
    assert math.isfinite(there)
    assert math.isfinite(here)
    assert not math.isclose(there, here, rel_tol=0.02, abs_tol=1e-9)
    assert one.method in METHODS
    assert one.pair() == (there, here)


def test_the_table_has_what_is_measured() -> None:
    found = table()
    assert list(found) == ["method", "who", "what they compute instead", "measured", "there", "here", "difference"]
    assert not found.isna().any(axis=None)
    assert (found["difference"] == found["there"] - found["here"]).all()
    assert not found.duplicated(["method", "who", "what they compute instead"]).any()


@every_method
def test_a_gradient_where_a_method_looks_and_nowhere_else(name: str) -> None:
    found = methods.gradient(name, PARAMETERS[name])
    asks = METHODS[name].asks_student
    for part in set(Feature) - {Feature.LOGITS}:
        sizes = [tensor.abs().max() for tensor in torch.utils._pytree.tree_leaves(getattr(found, part.value))]
        assert (max(sizes) > 0) == (part in asks), part


@every_method
def test_what_it_looks_at_is_what_it_says(name: str) -> None:
    method = METHODS[name]
    found = methods.looks(methods.adapted_method(name, PARAMETERS[name]))
    for part in method.asks_teacher:
        assert part.value in found["of the student"] + found["of the teacher"]
    assert ("per-device" in found["of the batch"]) == method.relational
    assert ("unmixed" in found["of the batch"]) == method.unmixed


def test_what_a_method_depends_on_is_seen() -> None:
    def looks(name: str) -> str:
        return methods.looks(methods.adapted_method(name, PARAMETERS[name]))["of the batch"]

    assert looks("kd") == "nothing"
    assert looks("dkd") == "the label"
    assert "which training image it is" in looks("crd")


def test_values_and_gradient_by_hand() -> None:
    p, q = (methods.output_of(who).logits.double().softmax(dim=1) for who in ("student", "teacher"))
    parameters = {"hard_weight": 0.5, "weight": 2.0, "temperature": 1.0}
    values = methods.values("kd", parameters).loc["value"]
    assert values["hard"] == pytest.approx(-0.5 * p.log().gather(1, methods.BATCH.labels[:, None]).mean().item(), abs=1e-4)
    assert values["kd"] == pytest.approx(2.0 * (q * (q / p).log()).sum(dim=1).mean().item(), abs=1e-4)
    assert_close(methods.gradient("kd", parameters).logits.double(), 2.0 * (p - q) / 4, rtol=1e-4, atol=1e-6)


def test_labels_and_indices_of_the_toy_fit() -> None:
    assert (methods.LABELS[methods.BATCH.index] == methods.BATCH.labels).all()
    assert (methods.BATCH.targets.argmax(dim=1) == methods.BATCH.labels).all()
