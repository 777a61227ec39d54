"""An exported student: timm loads it without kdlib and it says the same; its card tells what results/ tells; ONNX says the same too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file

from kdlib.errors import Refused
from kdlib.files import read_json
from kdlib.study.cli import export
from kdlib.study.training.experiment import Experiment
from kdlib.study.training.planned import run_folder
from tests import tiny, training

PLAIN = "test_resnet.r160_in1k"  # timm's own, small
SIZE = 16  # pixels: a patch of the latter
SIZED = "test_vit.r160_in1k"  # built for one size of image
LEAVES = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch 2.11's exporter, about its own code


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Two seeds of a hint method, each on one of our nets, one of timm's and one that is made for a size."""
    content = training.content(methods=["kd", "fitnet"], seeds=(0, 1))
    content["methods"]["fitnet"]["stage"] = 1
    only = content["comparisons"][training.COMPARISON]
    content["comparisons"] |= {name: only | {"student": model} for name, model in (("resnet", PLAIN), ("vit", SIZED))}
    content["recipes"]["strong"]["drop_path"] = 0.0
    content["comparisons"]["vit"]["methods"] = ["kd"]
    content["data"]["fractals"]["size"] = SIZE
    made = Experiment(tiny.write(tmp_path_factory.mktemp("a study"), content))
    made.prepare_data("fractals")
    made.make_teacher("small")
    for name in made.params.comparisons:
        made.distill(name)
    return made


def images(experiment: Experiment) -> torch.Tensor:
    return torch.from_numpy(np.array(experiment.data("fractals").test.images)).permute(0, 3, 1, 2) / 255


def top1(experiment: Experiment, logits: torch.Tensor) -> float:
    return float((logits.argmax(1).numpy() == experiment.data("fractals").test.labels).mean())


LOAD = """
import sys, torch, timm
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
assert not [name for name in sys.modules if name.startswith("kdlib")]
cfg = model.pretrained_cfg
images = torch.load(sys.argv[2])
mean, std = (torch.tensor(cfg[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
with torch.no_grad():
    torch.save(model((images - mean) / std), sys.argv[3])
"""


@pytest.mark.parametrize("comparison", ["resnet", "vit"])
def test_timm_loads_it_without_kdlib(experiment: Experiment, tmp_path: Path, comparison: str) -> None:
    run = (comparison, "kd", 1)
    export.export(experiment, run, tmp_path / "out")
    torch.save(images(experiment), tmp_path / "images.pt")
    arguments = [str(tmp_path / name) for name in ("out", "images.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=tmp_path)
    folder = run_folder(experiment.root, run)
    with torch.no_grad():
        expected = experiment.student(comparison, folder)(images(experiment)).logits
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert top1(experiment, found) == read_json(folder / "metrics.json")["test_top1"]


def test_our_nets_say_what_they_need(experiment: Experiment, tmp_path: Path) -> None:
    export.export(experiment, (training.COMPARISON, "kd", 0), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import kdlib.models" in card
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        found = model((images(experiment) - 0.5) / 0.5)
    assert top1(experiment, found) == read_json(run_folder(experiment.root, (training.COMPARISON, "kd", 0)) / "metrics.json")["test_top1"]


def test_adapters_stay_behind(experiment: Experiment, tmp_path: Path) -> None:
    export.export(experiment, ("resnet", "fitnet", 0), tmp_path)
    net = timm.create_model(PLAIN.partition(".")[0], num_classes=6, in_chans=1)
    assert load_file(tmp_path / "model.safetensors").keys() == net.state_dict().keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_classes"], config["model_args"]["in_chans"], config["pretrained_cfg"]["input_size"]) == (6, 1, [1, SIZE, SIZE])


def test_the_card_tells_data_teacher_method_recipe_accuracy_and_hardware(experiment: Experiment, tmp_path: Path) -> None:
    export.export(experiment, ("resnet", "kd", 0), tmp_path)
    card = (tmp_path / "README.md").read_text()
    both = [read_json(run_folder(experiment.root, ("resnet", "kd", seed)) / "metrics.json")["test_top1"] for seed in (0, 1)]
    assert f"| {100 * both[0]:.1f} % | {100 * np.mean(both):.1f}" in card
    assert "(n=2)" in card
    for part in (PLAIN, "kd_resnet8_w8_s1", "fractals, 48 training images (50 %), 6 classes", "'temperature': 1.0", "mixup_alpha 0.2"):
        assert part in card, part
    assert torch.__version__ in card
    assert "import kdlib" not in card


@LEAVES
@pytest.mark.parametrize("comparison", [training.COMPARISON, "vit"])
def test_onnx_says_the_same(experiment: Experiment, tmp_path: Path, comparison: str) -> None:
    assert export.to_onnx(experiment, (comparison, "kd", 0), tmp_path / "model.onnx") <= export.AGREE
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"images": images(experiment).numpy()})
    expected = read_json(run_folder(experiment.root, (comparison, "kd", 0)) / "metrics.json")["test_top1"]
    assert abs(top1(experiment, torch.from_numpy(found)) - expected) <= 1 / 24


@LEAVES
def test_an_onnx_file_that_disagrees_is_not_left_there(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "AGREE", -1.0)
    with pytest.raises(Refused, match=r"differ by .* the file was deleted"):
        export.to_onnx(experiment, (training.COMPARISON, "kd", 0), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (("onyl", "kd", 0), "did you mean 'only'"),
        (("only", "kdd", 0), "did you mean 'kd'"),
        (("only", "kd", 5), "found no finished run; .* `make study` first"),
    ],
)
def test_a_run_that_is_not_there_is_refused(experiment: Experiment, tmp_path: Path, run: tuple[str, str, int], message: str) -> None:
    with pytest.raises(Refused, match=message):
        export.export(experiment, run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(experiment: Experiment, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdlib.study.cli.export", "resnet", "kd", "0", str(tmp_path / "out"), "--onnx"],
        cwd=experiment.root,
        env=tiny_environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    assert "logits within" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors", "model.onnx"}


def tiny_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"}
