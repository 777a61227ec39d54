"""The measures against scikit-learn, SciPy and a slow loop; what they do at the edges; how a model is asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import Tensor, nn

from kdlib.engine import metrics as module
from kdlib.engine.metrics import Measures, calibration_error, measure, predict, to_images
from kdlib.types import Output
from tests.references import common as references

CPU = torch.device("cpu")


def draw(images: int = 500, classes: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(0)
    teacher = 3 * rng.normal(size=(images, classes))
    student = teacher + 2 * rng.normal(size=(images, classes))
    labels = (teacher + 3 * rng.normal(size=(images, classes))).argmax(axis=1)
    return torch.from_numpy(student).float(), torch.from_numpy(teacher).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("classes", [12, 5, 3])
def test_equal_to_other_libraries(classes: int) -> None:
    student, teacher, labels = draw(classes=classes)
    found = measure(student, teacher, labels)
    p, q = (np.exp([references.log_softmax(z) for z in logits.double().numpy()]) for logits in (student, teacher))
    y, known = labels.numpy(), np.arange(classes)
    assert found.top1 == pytest.approx(top_k_accuracy_score(y, p, k=1, labels=known))
    assert found.top5 == pytest.approx(top_k_accuracy_score(y, p, k=5, labels=known) if classes > 5 else 1.0)
    assert found.nll == pytest.approx(log_loss(y, p, labels=known))
    assert found.ece == pytest.approx(references.calibration_error(p.max(axis=1), p.argmax(axis=1) == y))
    assert found.agreement == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    assert found.teacher_kl == pytest.approx(entropy(q, p, axis=1).mean())
    assert 0.2 < found.top1 < 0.9  # the comparison above is not one of constants
    assert all(isinstance(value, float) for value in vars(found).values())


def test_by_hand() -> None:
    """Two classes, four images, confidence 3/4 each, two right: calibration error |1/2 - 3/4|. The teacher is undecided."""
    student = torch.tensor([[3.0, 1.0]] * 4).log()
    found = measure(student, torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    nll = -(np.log(3 / 4) + np.log(1 / 4)) / 2
    kl = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert vars(found) == pytest.approx(vars(Measures(top1=0.5, top5=1.0, nll=nll, ece=0.25, agreement=1.0, teacher_kl=kl)), rel=1e-6)


def test_a_teacher_against_itself() -> None:
    _, teacher, labels = draw()
    found = measure(teacher, teacher, labels)
    assert (found.agreement, found.teacher_kl) == (1.0, 0.0)


def test_ties_go_to_the_lower_class() -> None:
    """A dead model is right about class 0 only, and does not have every label among its first five."""
    labels = torch.arange(10)
    found = measure(torch.zeros(10, 10), torch.eye(10), labels)
    assert (found.top1, found.top5, found.agreement) == (0.1, 0.5, 0.1)


def test_nothing_depends_on_how_many_rows_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure(*draw())
    monkeypatch.setattr(module, "ROWS", 7)
    assert vars(measure(*draw())) == pytest.approx(vars(whole), rel=1e-12)


def test_very_sure_models_are_measured_exactly() -> None:
    found = measure(torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[0.0, 1e4, 0.0]]), torch.tensor([2]))
    assert (found.nll, found.ece, found.teacher_kl) == pytest.approx((2e4, 1.0, 1e4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_what_is_not_finite(bad: float) -> None:
    student, teacher, labels = draw()
    student[3, 4] = bad
    for pair in ((student, teacher), (teacher, student)):
        with pytest.raises(FloatingPointError, match="not finite"):
            measure(*pair, labels)


def test_refuses_an_empty_split() -> None:
    with pytest.raises(ValueError, match="found 0 images"):
        measure(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))


def test_calibration_error_at_the_edges_of_its_bins() -> None:
    """Bins are open below and closed above: 1/15 shares a bin with what is below, not above."""
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)[1:]
    rng = np.random.default_rng(1)
    for shift in (0.0, 1e-9, -1e-9):
        confidence = (edges + shift).clamp(max=1).repeat(3)
        correct = torch.from_numpy(rng.integers(0, 2, len(confidence)).astype(float))
        assert calibration_error(confidence, correct) == pytest.approx(references.calibration_error(confidence.numpy(), correct.numpy()))
    together = calibration_error(edges[[0, 0]] - torch.tensor([0.0, 1e-3]), torch.tensor([1.0, 0.0], dtype=torch.float64))
    apart = calibration_error(edges[[0, 0]] + torch.tensor([0.0, 1e-3]), torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert together == pytest.approx(abs(1 - 2 / 15 + 1e-3) / 2)
    assert apart == pytest.approx((1 - 1 / 15 + 1 / 15 + 1e-3) / 2)
    assert calibration_error(torch.ones(5), torch.ones(5)) == 0


class Probe(nn.Module):
    """Answers an image's first pixels, and remembers how it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.9)
        self.frozen = nn.BatchNorm1d(4)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Output:
        assert torch.is_inference_mode_enabled()
        assert not any(part.training for part in self.modules())
        assert images.is_contiguous(memory_format=torch.channels_last)
        self.sizes.append(len(images))
        self.norm(images)
        if len(images) == 3 and images[0, 0, 0, 0] == 1:
            raise RuntimeError("broken")
        return Output(self.frozen(self.drop(255 * images[:, 0, 0, :4])))


def memory_map(tmp_path: Path, images: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 255, (images, 6, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    return np.load(tmp_path / "images.npy", mmap_mode="r")


@pytest.mark.parametrize(("images", "sizes"), [(10, [4, 4, 2]), (8, [4, 4]), (3, [3])])
def test_predict_asks_for_every_image_once_and_in_order(tmp_path: Path, images: int, sizes: list[int]) -> None:
    pixels, model = memory_map(tmp_path, images), Probe()
    logits = predict(model, pixels, 4, CPU)
    assert model.sizes == sizes
    assert logits.dtype == torch.float32
    assert torch.equal(logits.round(), torch.from_numpy(np.array(pixels[:, 0, :4, 0])).float())
    (logits * nn.Parameter(torch.ones(()))).sum().backward()  # not an inference tensor


def test_predict_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Probe()
    model.frozen.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, memory_map(tmp_path, 8), 4, CPU)
    assert (model.training, model.norm.training, model.drop.training, model.frozen.training) == (True, True, True, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="broken"):
        predict(model, np.full((3, 6, 5, 3), 255, np.uint8), 4, CPU)
    assert (model.training, model.frozen.training) == (True, False)


def test_to_images_moves_no_pixel(tmp_path: Path) -> None:
    pixels = memory_map(tmp_path, 2)
    images = to_images(pixels, CPU)
    assert images.shape == (2, 3, 6, 5)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images[1, 2, 5, 3].item() == pytest.approx(int(pixels[1, 5, 3, 2]) / 255)
    assert 0 <= images.min() <= images.max() <= 1
