"""What cannot work is refused in one line before anything is trained or written; what goes wrong in training harms nothing else."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from kdlib.engine import checkpoint
from kdlib.losses import METHODS
from kdlib.models.build import build
from kdlib.study.training import experiment
from kdlib.study.training.checks import check_against_data
from kdlib.study.training.experiment import Diverged, Experiment
from tests import tiny, training
from tests.refusals import change, refused, untouched

PETS = {"source": "folder", "path": "pets", "size": 8, "val_fraction": 0.25, "test_fraction": 0.25, "seed": 0, "hflip": 0.5}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    training.prepared()  # once for all tests, and it may

    def started(*_: object, **__: object) -> None:
        pytest.fail("training was started")

    monkeypatch.setattr(experiment, "train", started)
    monkeypatch.setattr("kdlib.engine.train.TrainingLoop", started)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project whose folder holds the tiny study's data set, and nothing trained."""
    shutil.copytree(training.prepared() / "runs" / "data", tmp_path / "runs" / "data")
    return tmp_path


def opened(root: Path, content: dict[str, Any]) -> Experiment:
    return Experiment(tiny.write(root, content))


# Opening a study: what params.yaml alone tells


ALONE: dict[str, tuple[str, object, tuple[str, ...]]] = {
    # name of the case: key to change, value, what the line must say besides its own key
    "unknown optimizer": ("recipes.weak.optimizer", "sdg", ("found 'sdg'", "did you mean 'sgd'?")),
    "optimizer for a GPU": ("recipes.weak.optimizer", "fusedsgd", ("found 'fusedsgd'", "works on this machine", "choose another")),
    "optimizer of second order": ("recipes.weak.optimizer", "adahessian", ("works on this machine", "choose another")),
    "unknown student": (
        "comparisons.small_weak.student",
        "kd_resnet_8_w8_s1",
        ("found 'kd_resnet_8_w8_s1'", "did you mean 'kd_resnet8_w8_s1'?"),
    ),
    "unknown teacher": ("teachers.small.model", "resnet19", ("found 'resnet19'", "did you mean 'resnet18'?")),
    "unknown weights": ("teachers.small.model", "resnet18.best", ("found 'resnet18.best'", "did you mean 'resnet18'?")),
    "patches larger than the image": ("comparisons.small_weak.student", "vit_tiny_patch16_224", ("8 px", "choose another model or size")),
    "patches that do not divide it": ("teachers.small.model", "xcit_nano_12_p16_224", ("8 px", "choose another model or size")),
    "no room for its strides": ("comparisons.small_weak.student", "convnext_atto", ("8 px", "choose another model or size")),
    "no drop path": ("comparisons.large_strong.student", "vgg11", ("drop_path", "set drop_path to 0, or choose another model")),
    "images below 8 px": ("data.fractals.size", 7, ("found 7", "a number >= 8")),
    "temperature 0": ("methods.kd.temperature", 0, ("found 0.0", "a number > 0")),
    "tau 0": ("methods.dist.tau", 0, ("found 0.0", "a number > 0")),
    "negative weight": ("methods.dkd.weight", -1, ("found -1.0", "a number >= 0")),
    "negative hard weight": ("methods.kd.hard_weight", -0.5, ("found -0.5", "a number >= 0")),
    "nothing to learn from": ("methods.no_kd.hard_weight", 0, ("found 0.0", "a number > 0")),
    "negative beta": ("methods.dist.beta", -2, ("found -2.0", "a number >= 0")),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", ALONE)
def test_a_study_that_cannot_work_does_not_open(tmp_path: Path, case: str) -> None:
    key, value, parts = ALONE[case]
    tiny.write(tmp_path, change(tiny.content(), key, value))
    with untouched(tmp_path), refused(key, *parts):
        Experiment(tmp_path)


TOGETHER: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    # name of the case: keys to change, what the line about the methods of small_weak must say
    "a stage before the student's first": (
        {"methods.fitnet.stage": 9, "comparisons.small_weak.methods": ["kd", "fitnet"]},
        ("found fitnet with a student with 3 stages", "allowed: 9 or more", "choose another model, or an earlier stage"),
    ),
    "a stage before the teacher's first": (
        {"methods.fitnet.stage": 4, "comparisons.small_weak.methods": ["kd", "fitnet"], "comparisons.small_weak.student": "test_resnet"},
        ("found fitnet with a teacher with 3 stages", "allowed: 4 or more", "choose another model, or an earlier stage"),
    ),
    "attention to one place": (
        {"comparisons.small_weak.methods": ["kd", "at"], "comparisons.small_weak.student": "test_resnet"},
        ("found at with stages of one place each", "allowed: a stage of two places or more", "take larger images or another method"),
    ),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", TOGETHER)
def test_a_method_that_cannot_learn_from_these_models_is_refused(tmp_path: Path, case: str) -> None:
    changes, parts = TOGETHER[case]
    content = tiny.content()
    for key, value in changes.items():
        change(content, key, value)
    with refused("comparisons.small_weak.methods", *parts):
        opened(tmp_path, content)
    opened(tmp_path, change(content, "comparisons.small_weak.methods", ["kd"]))  # from which others can learn


def test_the_same_study_opens_without_its_faults(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    with untouched(tmp_path):
        Experiment(tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_parameters_of_a_method_are_exactly_its_own(tmp_path: Path, name: str) -> None:
    content = tiny.content()
    content["methods"][name]["zzz"] = 1.0
    with refused(f"methods.{name}.zzz", "found 'zzz'", *tiny.content()["methods"][name]):
        opened(tmp_path, content)
    for key in tiny.content()["methods"][name]:
        content = tiny.content()
        del content["comparisons"]["tuned"]  # its sweep names some of them
        del content["methods"][name][key]
        with refused(f"methods.{name}.{key}", "found nothing", "a number", "add this key"):
            opened(tmp_path, content)


def test_an_unknown_method_is_refused_with_the_closest_one(tmp_path: Path) -> None:
    content = tiny.content()
    content["methods"]["dkdd"] = content["methods"]["dkd"]
    with refused("methods.dkdd", "found 'dkdd'", ", dist, dkd, ", "did you mean 'dkd'?"):
        opened(tmp_path, content)


def test_a_bad_point_of_a_sweep_is_refused(tmp_path: Path) -> None:
    with refused("comparisons.tuned.sweep.grids.kd.temperature", "found 0.0", "a number > 0"):
        opened(tmp_path, change(tiny.content(), "comparisons.tuned.sweep.grids.kd.temperature", [1, 0]))


def two_class_study() -> dict[str, Any]:
    content = change(tiny.content(), "data.fractals.classes", 2)
    content["study"]["challengers"] = ["dist"]
    for comparison in content["comparisons"].values():
        comparison |= {"methods": ["no_kd", "kd", "dist"], "sweep": None}
    return content


def test_a_method_that_needs_more_classes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, two_class_study())
    content = change(two_class_study(), "comparisons.small_weak.methods", ["kd", "dkd"])
    with refused("comparisons.small_weak.methods", "dkd with 2 classes", "3 or more"):
        opened(tmp_path, content)
    sweep = {"seed": 0, "grids": {"kd": {"weight": [1]}, "dkd": {"beta": [1]}}}
    with refused("comparisons.tuned.sweep.grids", "dkd with 2 classes", "3 or more"):
        opened(tmp_path, change(two_class_study(), "comparisons.tuned.sweep", sweep))
    monkeypatch.setattr(METHODS["kd"], "adapt", METHODS["dkd"].adapt)  # the check knows no method by name
    with refused("comparisons.large_strong.methods", "kd with 2 classes", "3 or more"):
        opened(tmp_path, two_class_study())


def test_a_method_that_needs_unmixed_images_is_refused_where_all_are_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS["dist"], "unmixed", True)
    opened(tmp_path, tiny.content())  # only under the weak recipe, which does not mix
    for alpha in ("mixup_alpha", "cutmix_alpha"):
        with refused("comparisons.small_weak.methods", "dist with recipe 'weak', which mixes every image", "set mixup_alpha and"):
            opened(tmp_path, change(tiny.content(), f"recipes.weak.{alpha}", 0.2))


def test_no_hard_label_and_no_teacher_is_nothing_to_learn_from(tmp_path: Path) -> None:
    with refused("comparisons.small_weak.methods", "no_kd with recipe 'weak', whose hard_loss is none", "a method that asks the teacher"):
        opened(tmp_path, change(tiny.content(), "recipes.weak.hard_loss", "none"))


# Data


def pets(root: Path, classes: int = 2, images: int = 8) -> dict[str, Any]:
    """Image files of ``classes`` classes, and a params.yaml with a data set of them."""
    for label in range(classes):
        folder = root / "pets" / f"class_{label}"
        folder.mkdir(parents=True)
        for number in range(images):
            Image.new("RGB", (8, 8), (100 * label, 10 * number, 0)).save(folder / f"{number}.png")
    content = tiny.content()
    content["data"]["pets"] = dict(PETS)
    return content


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def empty_class(folder: Path) -> None:
    (folder / "class_2").mkdir()


def truncate(folder: Path) -> None:
    image = folder / "class_1" / "3.png"
    image.write_bytes(image.read_bytes()[:40])


def unreadable(folder: Path) -> None:
    (folder / "class_1" / "3.png").write_bytes(b"no image")


def unlabelled(folder: Path) -> None:
    shutil.copy(folder / "class_1" / "3.png", folder / "3.png")


def too_few(folder: Path) -> None:
    for number in range(2, 8):
        (folder / "class_1" / f"{number}.png").unlink()


BAD_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing folder": (remove_folder, "a folder that exists"),
    "empty class": (empty_class, "class_2"),
    "truncated image": (truncate, "class_1/3.png"),
    "unreadable image": (unreadable, "class_1/3.png"),
    "image without a label": (unlabelled, "pets/3.png"),
    "too few to hold some out": (too_few, "'class_1'"),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_leave_no_data_set(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(tmp_path, pets(tmp_path))
    damage, part = BAD_DATA[case]
    damage(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "data").mkdir(parents=True)
    with untouched(tmp_path), refused("data.pets.path", part):
        study.prepare_data("pets")


@pytest.mark.usefixtures("no_training")
def test_a_label_without_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet's official validation split has no image of one of its classes."""
    content = pets(tmp_path, classes=3)
    (tmp_path / "in").mkdir()
    shutil.copytree(tmp_path / "pets", tmp_path / "in" / "train")
    shutil.copytree(tmp_path / "pets", tmp_path / "in" / "val")
    shutil.rmtree(tmp_path / "in" / "val" / "class_1")
    content["data"]["pets"] = {"source": "imagenet", "path": "in", "size": 8, "val_fraction": 0.25, "seed": 0, "hflip": 0.5}
    study = opened(tmp_path, content)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "data").mkdir(parents=True)
    with untouched(tmp_path), refused("data.pets.path", "class_1 in only one of train/ and val/", "the same classes in both"):
        study.prepare_data("pets")


@pytest.mark.usefixtures("no_training")
def test_a_name_that_is_not_in_the_study_is_refused(root: Path) -> None:
    study = opened(root, tiny.content())
    with untouched(root), refused("data", "found 'fractal'", "did you mean 'fractals'?"):
        study.prepare_data("fractal")
    with untouched(root), refused("teachers", "found 'smal'", "did you mean 'small'?"):
        study.make_teacher("smal")
    with untouched(root), refused("comparisons", "found 'small_week'", "did you mean 'small_weak'?"):
        study.distill("small_week")
    with untouched(root), refused("comparisons", "found 'small_week'", "did you mean 'small_weak'?"):
        study.try_method("small_week", "kd", 0)


# What only the data tell


@pytest.mark.usefixtures("no_training")
def test_a_batch_larger_than_the_split_is_refused(root: Path) -> None:
    content = tiny.content()
    content["comparisons"] = {"small_weak": content["comparisons"]["small_weak"] | {"fraction": 1.0}}
    content["recipes"]["weak"]["batch_size"] = 97
    study = opened(root, content)
    with untouched(root), refused("recipes.weak.batch_size", "found 97", "at most the 96 training images of teachers.small"):
        study.make_teacher("small")


@pytest.mark.usefixtures("no_training")
def test_a_batch_larger_than_the_fraction_is_refused_before_the_teacher_is_trained(root: Path) -> None:
    study = opened(root, change(tiny.content(), "recipes.weak.batch_size", 49))
    calls: list[Callable[[], object]] = [
        lambda: study.make_teacher("small"),
        lambda: study.distill("small_weak"),
        lambda: study.distill("large_strong"),
        lambda: study.try_method("small_weak", "kd", 0),
    ]
    for call in calls:
        with untouched(root), refused("recipes.weak.batch_size", "found 49", "at most the 48 training images of comparisons.small_weak"):
            call()
    whole = change(tiny.content(), "recipes.weak.batch_size", 48)
    check_against_data(opened(root, whole).params, study.data("fractals"))  # all of them at once are allowed


@pytest.mark.usefixtures("no_training")
def test_classes_that_only_the_data_tell_are_checked_before_the_teacher_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = pets(tmp_path, classes=2, images=40)
    content["teachers"]["small"]["data"] = "pets"
    for comparison in content["comparisons"].values():
        comparison["data"] = "pets"
    study = opened(tmp_path, content)
    monkeypatch.chdir(tmp_path)
    study.prepare_data("pets")
    for call in (lambda: study.make_teacher("small"), lambda: study.distill("small_weak")):
        with untouched(tmp_path), refused("comparisons.large_strong.methods", "dkd with 2 classes"):
            call()


@pytest.mark.usefixtures("no_training")
def test_distilling_without_data_or_teacher_is_refused(root: Path) -> None:
    study = opened(root, tiny.content())
    with untouched(root), refused("teachers.small", "found 'no weights'", "run `dvc repro teacher@small`"):
        study.distill("small_weak")
    shutil.rmtree(root / "runs" / "data" / "fractals")
    for call in (lambda: study.make_teacher("small"), lambda: study.distill("small_weak")):
        with untouched(root), refused("data.fractals", "run the data stage again"):
            call()


# Teachers


def weights(classes: int, model: str = training.NET) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in build(model, classes, 1, 8).net.state_dict().items()}


def infinite() -> dict[str, Tensor]:
    state = weights(6)
    state["fc.bias"][0] = torch.nan
    return state


CHECKPOINTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("teacher.safetensors", lambda _: None, "correct the path"),
    "a folder": ("teacher.safetensors", lambda path: path.mkdir(), "a .safetensors or .pth file"),
    "other classes": ("teacher.safetensors", lambda path: save_file(weights(5), path), "for 6 classes"),
    "other classes, torch": ("teacher.pth", lambda path: torch.save(weights(10), path), "for 6 classes"),
    "another model": ("teacher.safetensors", lambda path: save_file(weights(6, "resnet10t"), path), "weights of kd_resnet8_w8_s1"),
    "not weights": ("teacher.pth", lambda path: torch.save([1, 2], path), "weights of kd_resnet8_w8_s1"),
    "code": ("teacher.pth", lambda path: torch.save(torch.nn.Linear(2, 2), path), "weights_only"),
    "empty": ("teacher.pth", lambda path: path.write_bytes(b"") and None, "EOFError"),
    "garbage": ("teacher.pth", lambda path: path.write_bytes(b"hello") and None, "weights of kd_resnet8_w8_s1"),
    "truncated": ("teacher.safetensors", lambda path: path.write_bytes(b"\x08") and None, "weights of kd_resnet8_w8_s1"),
    "not finite": ("teacher.safetensors", lambda path: save_file(infinite(), path), "weights that give finite logits"),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_cannot_teach_is_refused(root: Path, case: str) -> None:
    file, write, part = CHECKPOINTS[case]
    write(root / file)
    study = opened(root, change(tiny.content(), "teachers.small.checkpoint", file))
    with untouched(root / "runs"), refused("teachers.small.checkpoint", file, part):
        study.make_teacher("small")


@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_that_fits_is_loaded_and_has_its_gate(root: Path) -> None:
    save_file(weights(6), root / "teacher.safetensors")
    content = change(tiny.content(), "teachers.small.checkpoint", "teacher.safetensors")
    metrics = opened(root, content).make_teacher("small")
    assert metrics["status"] == "finished"
    shutil.rmtree(root / "runs" / "teacher")
    content["teachers"]["small"]["min_top1"] = 1.0
    with untouched(root / "runs"), refused("teachers.small.min_top1", f"{metrics['test_top1']:.4f}", "test split"):
        opened(root, content).make_teacher("small")


def test_a_teacher_below_its_gate_teaches_nobody_and_is_not_trained_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = change(tiny.content(), "teachers.small.min_top1", 1.0)
    content["recipes"]["weak"]["epochs"] = 1
    with untouched(root / "runs"), refused("teachers.small.min_top1", "found 1.0", "test split", "demand less of it") as lines:
        opened(root, content).make_teacher("small")
    with refused("teachers.small", "found 'no weights'"):
        opened(root, content).distill("small_weak")
    monkeypatch.setattr(experiment, "train", lambda *_, **__: pytest.fail("trained again"))
    content["teachers"]["small"]["min_top1"] = 0.01
    metrics = opened(root, content).make_teacher("small")
    assert f"the top-1 of {metrics['test_top1']:.4f} that" in lines[0]
    assert 0.01 < metrics["test_top1"] < 1
    run = json.loads((root / "runs" / "teacher" / "small" / "run.json").read_text())
    assert run["min_top1"] == 0.01


# During training


def diverging(**study: Any) -> dict[str, Any]:
    """kd's weight makes its loss infinite in the first steps; the other methods learn as ever."""
    content = training.content(methods=["no_kd", "kd", "dkd"], baseline="no_kd", challengers=["kd", "dkd"], **study)
    content["recipes"]["strong"]["epochs"] = 1.0
    return change(content, "methods.kd.weight", 1e38)


def test_a_run_that_diverges_says_so_and_the_others_are_what_they_are_without_it(tmp_path: Path) -> None:
    root = training.fresh(tmp_path / "with", diverging())
    folders = opened(root, diverging()).distill(training.COMPARISON)
    found = {folder.parent.name: json.loads((folder / "metrics.json").read_text()) for folder in folders}
    assert {name: metrics["status"] for name, metrics in found.items()} == {"no_kd": "finished", "kd": "diverged", "dkd": "finished"}
    run = json.loads((root / "runs" / "distill" / training.COMPARISON / "kd" / "seed_0" / "run.json").read_text())
    assert run["method"] == run["variant"] == "kd"
    assert 0 <= found["kd"]["diverged_step"] < 6
    assert "weight" in found["kd"]["diverged_cause"] and "\n" not in found["kd"]["diverged_cause"]
    assert not [name for name in found["kd"] if name.startswith(("val_", "test_"))]
    assert 0 <= found["dkd"]["test_top1"] <= 1

    without = change(diverging(), f"comparisons.{training.COMPARISON}.methods", ["no_kd", "dkd"])
    alone = training.fresh(tmp_path / "without", without)
    opened(alone, without).distill(training.COMPARISON)
    kept = {name: content for name, content in training.numbers(root).items() if "/kd/" not in name}
    assert len(kept) == 6
    assert kept == training.numbers(alone)


def test_on_divergence_fail_stops_after_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = training.fresh(tmp_path / "project", diverging(on_divergence="fail"))
    line = r"^params\.yaml: study\.on_divergence: found 'fail'; only seed 0: kd diverged at step \d: [^\n]*; change that, or set [^\n]*$"
    with untouched(root / "runs"), pytest.raises(Diverged, match=line):
        opened(root, diverging(on_divergence="fail")).distill(training.COMPARISON)
    monkeypatch.setattr(experiment, "train", lambda *_, **__: pytest.fail("trained again"))
    folders = opened(root, diverging()).distill(training.COMPARISON)
    assert [json.loads((folder / "metrics.json").read_text())["status"] for folder in folders] == ["finished", "diverged", "finished"]


def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = training.content(methods=["kd"], checkpoint_seconds=0)
    root = training.fresh(tmp_path / "full", content)
    synced, writes = os.fsync, iter(range(1000))

    def full_after_three(file: int) -> None:
        if next(writes) < 3:
            return synced(file)
        os.ftruncate(file, 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_three)
        with untouched(root / "runs"), refused("disk", "no room left", "run the same command again"):
            opened(root, content).distill(training.COMPARISON)
    (run,) = [folder for folder in training.store(root).iterdir() if folder.is_dir()]
    assert sorted(file.name for file in run.iterdir()) == ["checkpoint-0000000002.pt", "checkpoint-0000000003.pt"]
    state = checkpoint.newest(run)
    assert state is not None and state["step"] == 3

    opened(root, content).distill(training.COMPARISON)
    other = training.fresh(tmp_path / "roomy", content)
    opened(other, content).distill(training.COMPARISON)
    assert training.numbers(root) == training.numbers(other)


@pytest.mark.parametrize("stage", ["make_teacher", "distill", "try_method"])
def test_other_errors_of_the_disk_are_not_called_a_full_one(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = opened(training.fresh(tmp_path / "project", training.content()), training.content())

    def broken(*_: object, **__: object) -> None:
        raise OSError(number, "of the disk")

    monkeypatch.setattr(experiment, "train", broken)
    arguments = {"make_teacher": ("small",), "distill": (training.COMPARISON,), "try_method": (training.COMPARISON, "kd", 3)}
    for code in (errno.ENOSPC, errno.EDQUOT):
        number = code
        with refused("disk", "no room left"):
            getattr(study, stage)(*arguments[stage])
    number = errno.EIO
    with pytest.raises(OSError, match="of the disk"):
        getattr(study, stage)(*arguments[stage])


@pytest.mark.parametrize(("stage", "recipe"), [("make_teacher", "weak"), ("distill", "strong"), ("try_method", "strong")])
def test_a_gpu_too_small_is_one_line_that_names_the_group(tmp_path: Path, stage: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = training.content(methods=["kd"])
    root = training.fresh(tmp_path / "project", content)
    shutil.rmtree(training.store(root), ignore_errors=True)
    study = opened(root, content)
    group = content["recipes"][recipe]["group_size"] or content["recipes"][recipe]["batch_size"]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("kdlib.engine.learner.Learner.take", full)
    arguments = {"make_teacher": ("small",), "distill": (training.COMPARISON,), "try_method": (training.COMPARISON, "kd", 3)}
    with refused(f"recipes.{recipe}.group_size", f"'{group} images", "CUDA out of memory.", "`python -m kdlib.study plan`"):
        getattr(study, stage)(*arguments[stage])


# Through the command


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode not in (0, None), done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def test_check_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    root = tiny.write(tmp_path / "a study", change(tiny.content(), "methods.dkd.temperature", 0))
    with untouched(root):
        line = one_line(command(root, "kdlib.study", "check"))
    assert line == "params.yaml: methods.dkd.temperature: found 0.0; allowed: a number > 0; change it"
    with untouched(tmp_path):
        assert one_line(command(tmp_path, "kdlib.study", "run")).startswith("params.yaml: found none in ")


def test_a_stage_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    content = tiny.content()
    content["data"]["pets"] = dict(PETS)
    root = tiny.write(tmp_path / "a study", content)
    shutil.copy(tiny.ROOT / "dvc.yaml", root)
    shutil.copytree(tiny.ROOT / "notebooks", root / "build" / "nb")
    (root / "kdlib").symlink_to(tiny.ROOT / "kdlib")
    with untouched(root):
        assert one_line(command(root, "kdlib.study.cli.notebook", "run", "data@pet")).endswith("did you mean 'pets'?")
        assert one_line(command(root, "kdlib.study.cli.notebook", "run", "date@pets")).startswith("dvc.yaml: found no stage 'date'")
    line = one_line(command(root, "kdlib.study.cli.notebook", "run", "data@pets"))
    assert line == f"params.yaml: data.pets.path: found '{root / 'pets'}'; allowed: a folder that exists; correct the path"
    assert not (root / "runs").exists()
    assert [path.name for path in (root / ".state" / "live").iterdir()] == ["data.pets.ipynb"]  # as far as it came
