"""studies/imagenet end to end, with its own architectures, on small images: trained, killed, resumed, shared out, exported, measured."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm

from kdlib import config
from kdlib.engine.metrics import predict
from kdlib.files import read_json
from kdlib.models.checkpoints import load_checkpoint
from kdlib.study.cli.export import export
from kdlib.study.cli.study import _stages
from kdlib.study.report import build
from kdlib.study.report.render import write_table
from kdlib.study.training import planned
from kdlib.study.training.experiment import Experiment
from tests import imagenet, jpegs, published_recipes, tiny, training

COMPARISONS = ("f1_030", "t1_r56_r20_previous", "t3_r152_a2_hints", "t6_vit_tiny", "t6_convnextv2_tiny")  # of every kind of student
FEWER = {"t6_vit_tiny": ["kd"], "t6_convnextv2_tiny": ["kd"]}  # their other methods are f1_030's
DISTILL = (
    "import sys, pathlib; from kdlib.study.training.experiment import Experiment; "
    "Experiment(pathlib.Path(sys.argv[1])).distill(sys.argv[2])"
)
REPEATED = "f1_030"  # by two processes
KILLED = "t6_vit_tiny"  # the smallest checkpoints: one is written after each step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Folders laid out as ImageNet and CIFAR-100 are."""
    folder = tmp_path_factory.mktemp("inputs")
    with pytest.MonkeyPatch.context() as patched:
        yield jpegs.write(folder / "imagenet"), imagenet.write_cifar(folder / "cifar", patched)


def content(inputs: tuple[Path, Path], comparisons: Sequence[str] = COMPARISONS, **study: Any) -> dict[str, Any]:
    made = imagenet.content(*inputs, comparisons, **study)
    for name in FEWER.keys() & made["comparisons"].keys():
        made["comparisons"][name]["methods"] = FEWER[name]
    return made


def prepared(root: Path, made: dict[str, Any]) -> Experiment:
    """Data and teachers ready."""
    imagenet.write_weights(tiny.write(root, made), made)
    shutil.copytree(tiny.ROOT / "results" / "published", root / "results" / "published")
    experiment = Experiment(root)
    for name in made["data"]:
        experiment.prepare_data(name)
    for name in made["teachers"]:
        experiment.make_teacher(name)
    return experiment


@pytest.fixture(scope="module")
def study(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Experiment]:
    """Some comparisons, each trained by this process."""
    root = tmp_path_factory.mktemp("study")
    experiment = prepared(root, content(inputs))
    for name in COMPARISONS:
        experiment.distill(name)
    yield experiment
    shutil.rmtree(root)  # some GB


def again(study: Experiment, root: Path, made: dict[str, Any]) -> Path:
    """The same study with nothing distilled."""
    tiny.write(root, made)
    for name in ("data", "teacher"):
        shutil.copytree(study.root / "runs" / name, root / "runs" / name, copy_function=os.link)
    return root


def check_finished(study: Experiment, name: str) -> None:
    folders = {path.parent: read_json(path) for path in (study.root / "runs" / "distill" / name).rglob("metrics.json")}
    assert len(folders) == len(study.params.comparisons[name].methods)
    for folder, metrics in folders.items():
        assert metrics["status"] == "finished"
        assert np.isfinite(pd.read_csv(folder / "curve.csv")["loss"]).all()


def test_every_student_learns_from_its_teacher(study: Experiment) -> None:
    for name in COMPARISONS:
        check_finished(study, name)


def test_its_tables_put_published_numbers_beside_measured_ones(study: Experiment) -> None:
    made = build.finished_part(study.root, study.params)
    numbers = build.read_numbers(study.root, made, study.params)
    out = study.root / "results"
    for table in build.build_tables(made, numbers):
        write_table(table, out / "tables")
    found = pd.read_csv(out / "tables" / "published.csv")
    ours = found[found["comparison"] == REPEATED]
    assert len(ours)
    assert (ours["n"] == 1).all()
    assert ours["mean"].notna().all()
    assert found[found["comparison"].isna() & (found["table"] != "teachers")]["mean"].isna().all()
    assert set(ours["settings"]) == {"assumed"}
    assert set(ours["verdict"]) == {"assumed settings"}


def test_killed_and_resumed_it_ends_with_the_same_bytes(study: Experiment, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    root = again(study, tmp_path / "study", content(inputs, [KILLED], checkpoint_seconds=0))
    command, alone = [sys.executable, "-c", DISTILL, str(root), KILLED], os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tiny.ROOT, env=alone, stdout=log, stderr=log, start_new_session=True) as first,
    ):
        while not list(training.store(root).rglob("checkpoint-*.pt")):
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.killpg(first.pid, signal.SIGKILL)
    assert not training.numbers(root)
    subprocess.run(command, cwd=tiny.ROOT, env=alone, check=True, timeout=200)
    theirs = {path: read for path, read in training.numbers(study.root).items() if path.startswith(KILLED)}
    assert training.numbers(root) == theirs


def test_two_processes_are_one(study: Experiment, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    launch = {"processes": 2, "nodes": 1, "rendezvous": None}
    root = again(study, tmp_path, content(inputs, [REPEATED], launch=launch))  # CIFAR-100's batch is one mix group
    Experiment(root).distill(REPEATED)
    paths = sorted((study.root / "runs" / "distill" / REPEATED).rglob("curve.csv"))
    assert paths
    for path in paths:
        ours, theirs = (pd.read_csv(one) for one in (path, root / path.relative_to(study.root)))
        np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=2e-2)


def test_an_exported_student_scores_as_its_run_did(study: Experiment, tmp_path: Path) -> None:
    """Read by the way that released files take, and measured on the test images anew."""
    run = ("t6_vit_tiny", "kd", 0)
    export(study, run, tmp_path)
    model, data = study.params.comparisons[run[0]].student, study.data("imagenet")
    made = load_checkpoint("CHECKPOINT", tmp_path / "model.safetensors", model, (data.classes, data.channels, data.size))
    logits = predict(made.eval(), data.test.images, imagenet.BATCH, training.CPU)
    metrics = read_json(planned.run_folder(study.root, run) / "metrics.json")
    assert metrics["test_top1"] == pytest.approx((logits.argmax(1).numpy() == data.test.labels).mean())
    alone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert alone.state_dict().keys() == made.net.state_dict().keys()


def test_recipes_are_the_papers() -> None:
    """But for the augmentation on the device, which params.yaml says."""
    recipes = config.load(imagenet.STUDY).recipes
    for name, strategy in (("a1", "A1"), ("a2", "A2")):
        assert recipes[name] == published_recipes.strong(strategy, augment="batched")
    numbers = ("epochs", "batch_size", "learning_rate", "weight_decay", "milestones", "warmup")
    for name, strategy in zip(("previous", "cifar_previous"), published_recipes.PREVIOUS, strict=True):
        theirs = published_recipes.previous(strategy)
        assert [getattr(recipes[name], each) for each in numbers] == [getattr(theirs, each) for each in numbers]


def test_data_sets_whose_variable_is_unset_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One command, given the path of ImageNet."""
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.delenv("CIFAR100", raising=False)
    data, trained, tabled = _stages(imagenet.STUDY)
    assert "leaves out cifar100" in capsys.readouterr().err
    assert data == ["data@imagenet"]
    assert {"teacher@beit_base", "distill@t2_a2"} <= set(trained)
    left = {name for name, item in config.load(imagenet.STUDY).comparisons.items() if item.data == "cifar100"}
    assert left == {"t1_r56_r20_previous", "t1_r56_r20_strong", "t1_r50_mv2_previous", "t1_r50_mv2_strong"}
    assert not {"teacher@resnet56", "teacher@cifar_resnet50", *(f"distill@{name}" for name in left)} & set(trained)
    assert tabled == ["--single-item", "notebook@4_tables", "tables", "readme"]
    monkeypatch.delenv("IMAGENET")
    assert _stages(imagenet.STUDY) == [["data"], []]  # which refuses the first of them
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    monkeypatch.setenv("CIFAR100", "/data/cifar")
    assert _stages(imagenet.STUDY) == [["data"], []]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_comparison_of_the_study(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """All 53, BEiTv2-L among the teachers: 10 GB on the disk while it runs."""
    made = imagenet.content(*inputs)
    experiment = prepared(tmp_path, made)
    for name in made["comparisons"]:
        experiment.distill(name)
        check_finished(experiment, name)
        for weights in (tmp_path / "runs" / "distill" / name).rglob("*.safetensors"):
            weights.unlink()  # copies of what the store has
