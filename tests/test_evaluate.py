"""A checkpoint on ImageNet and the sets made for its classes: which answers are right, exact counts, and what stands beside them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.imagenet_info import ImageNetInfo
from timm.data.transforms_factory import create_transform

from kdlib.errors import Refused
from kdlib.models.build import Classifier, build
from kdlib.study.cli import evaluate, evaluation_sets
from kdlib.study.cli.evaluate import CLASSES, View, hits
from kdlib.study.cli.evaluation_sets import EvaluationSet, by_folder, open_set, parse_real, reassessed
from kdlib.study.report import published
from tests import tiny
from tests.refusals import refused

MODEL, SIZE = "vit_tiny_patch16_224", 32
VIEW = View(SIZE, 0.95, "bicubic")
WNIDS = ImageNetInfo().label_names()
FIRST = (10, 2, 999, 0, 6)  # the classes that the favouring model names first, whatever it sees; 6 and 999 are in ImageNet-A too


def jpeg(path: Path, seed: int = 0, sides: tuple[int, int] = (20, 16), mode: str = "RGB") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*sides[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, "JPEG")
    return str(path)


def numbered(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every set with one image per class, and two more of class 10; of ImageNet-A the second class twice."""
    root = tmp_path_factory.mktemp("data")
    image = Path(jpeg(root / "image.JPEG"))
    order = np.random.default_rng(0).permutation(1000) + 1
    for label, wnid in enumerate(WNIDS):
        for folder, name in ((f"imagenet/val/{wnid}", numbered(int(order[label]))), (f"v2/{label}", "0.jpeg")):
            (root / folder).mkdir(parents=True)
            os.link(image, root / folder / name)
    for more in (1001, 1002):
        os.link(image, root / "imagenet" / "val" / WNIDS[10] / numbered(more))
        os.link(image, root / "v2" / "10" / f"{more}.jpeg")
    for name in ("a", "r"):
        for wnid in evaluation_sets._packed(f"imagenet_{name}_synsets.txt").split():
            (root / name / wnid).mkdir(parents=True)
            os.link(image, root / name / wnid / "0.jpg")
    os.link(image, root / "a" / WNIDS[6] / "1.jpg")
    labels: list[object] = [[] for _ in range(1002)]
    labels[order[10] - 1] = [3, 10]  # of an image of class 10: its first answer is right
    labels[order[5] - 1] = [999]  # of an image of class 5: found among the first five
    labels[order[4] - 1] = [4]  # wrong
    labels[1000], labels[1001] = float("nan"), None
    (root / "real.json").write_text(json.dumps(labels))
    return root


@pytest.fixture(scope="module")
def favouring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that name the classes of ``FIRST`` first, in this order, for any image."""
    net = timm.create_model(MODEL, img_size=SIZE)
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    bias = torch.zeros(CLASSES)
    bias[list(FIRST)] = torch.arange(len(FIRST), 0, -1.0)
    path = tmp_path_factory.mktemp("weights") / "favouring.safetensors"
    save_file(weights | {"head.weight": torch.zeros(CLASSES, 192), "head.bias": bias}, path)
    return path


# Which answers are right


def test_ours_are_the_1000_classes_and_their_subsets() -> None:
    """ReaL labels 46,837 of 50,000 images, says its paper, arXiv 2006.07159, section 3."""
    assert (WNIDS[0], WNIDS[999], len(WNIDS)) == ("n01440764", "n15075141", 1000)
    for name in ("a", "r"):
        subset = evaluation_sets._packed(f"imagenet_{name}_synsets.txt").split()
        assert len(set(subset)) == 200
        assert set(subset) < set(WNIDS)
    real = evaluation_sets._real(None)
    assert (len(real), sum(bool(answers) for answers in real)) == (50_000, 46_837)


def test_a_folder_is_the_answer(tmp_path: Path) -> None:
    for folder in ("10", "2", "7"):
        jpeg(tmp_path / folder / "b.JPEG")
    jpeg(tmp_path / "2" / "a.JPEG")
    found = by_folder("v2", tmp_path, {"2": 2, "7": 7, "10": 10})
    assert [(Path(file).parent.name, Path(file).name) for file in found.files] == [
        ("2", "a.JPEG"),
        ("2", "b.JPEG"),
        ("7", "b.JPEG"),
        ("10", "b.JPEG"),
    ]
    assert found.answers == [(2,), (2,), (7,), (10,)]
    assert found.classes == [2, 7, 10]


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        ({"2": 2, "7": 7, "8": 8}, ("1 missing (8)", "for each of 3 classes, 2 to 8")),
        ({"2": 2}, ("1 unexpected (7)",)),
        ({str(label): label for label in range(7)}, ("6 missing (0, 1, 3, 4, 5 and 1 more), 1 unexpected (7)",)),
    ],
)
def test_folders_of_another_set_are_refused(tmp_path: Path, number: dict[str, int], parts: tuple[str, ...]) -> None:
    for folder in ("2", "7"):
        jpeg(tmp_path / folder / "a.JPEG")
    with refused("--data v2", str(tmp_path), "choose the folder of this set", *parts):
        by_folder("v2", tmp_path, number)


def test_sets_know_each_others_folders_apart(data: Path) -> None:
    with refused("--data r", "unexpected", "missing"):
        open_set("r", data / "a")
    with refused("--data imagenet", "1000 missing (n01440764"):
        open_set("imagenet", data / "v2")
    with refused("--data", "did you mean 'sketch'?"):
        open_set("skech", data)
    with refused("--data imagenet", "a folder that exists"):
        open_set("imagenet", data / "nowhere")


def test_real_answers_by_the_images_number() -> None:
    files = [f"/val/x/{numbered(number)}" for number in (3, 1, 2)]
    images = EvaluationSet("real", files, [(0,)] * 3, list(range(1000)))
    found = reassessed("--data real", images, parse_real("real", json.loads("[[5], [], [7, 8]]")))
    assert (found.files, found.answers) == ([files[0], files[1]], [(7, 8), (5,)])
    assert parse_real("real", json.loads("[NaN, null, [], [1]]")) == [(), (), (), (1,)]


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000004.JPEG", "ILSVRC2012_val_00000000.JPEG", "a.JPEG", "n1_00000001.JPEG"])
def test_an_image_that_real_does_not_know_is_refused(name: str) -> None:
    images = EvaluationSet("real", [f"/val/x/{name}"], [(0,)], [0])
    with refused("--data real", name, "ILSVRC2012_val_00000001 to 00000003"):
        reassessed("--data real", images, [(1,), (2,), (3,)])


@pytest.mark.parametrize(
    ("text", "part"),
    [("{}", "a dict"), ("[1]", "1 of image 1"), ("[[1], [1000]]", "[1000] of image 2"), ("[[true]]", "[True]"), ("[[", "can be read")],
)
def test_labels_that_are_not_reals_are_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "real.json").write_text(text)
    with refused("--real-labels", part, "give ReaL's real.json"):
        evaluation_sets._real(tmp_path / "real.json")
    with refused("--real-labels", "No such file"):
        evaluation_sets._real(tmp_path / "none.json")


# Counting


@pytest.mark.parametrize(
    ("logits", "right", "top1", "top5"),
    [
        ([5, 4, 3, 2, 1, 0], [0], 1, 1),
        ([5, 4, 3, 2, 1, 0], [4], 0, 1),
        ([5, 4, 3, 2, 1, 0], [5], 0, 0),
        ([5, 4, 3, 2, 1, 0], [5, 1], 0, 1),
        ([5, 4, 3, 2, 1, 0], [5, 0], 1, 1),
        ([1, 1, 1, 1, 1, 1], [0], 1, 1),  # of equal ones the lower class comes first
        ([1, 1, 1, 1, 1, 1], [5], 0, 0),
        ([0, 1], [0], 0, 1),  # fewer than five classes
    ],
)
def test_hits(logits: list[float], right: list[int], top1: int, top5: int) -> None:
    mask = torch.zeros(1, len(logits), dtype=torch.bool)
    mask[0, right] = True
    found = hits(torch.tensor([logits, logits], dtype=torch.float32), mask.expand(2, -1))
    assert found.tolist() == [2 * top1, 2 * top5]


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return build(MODEL, CLASSES, 3, SIZE).eval()


KINDS = {"RGB": (40, 30), "L": (30, 40), "CMYK": (33, 33), "RGB, one pixel wide": (1, 90), "RGB, large": (900, 700)}


def logits_of_timm(classifier: Classifier, file: str) -> torch.Tensor:
    """By timm alone: its transform, its normalisation, its model."""
    looks = timm.get_pretrained_cfg(MODEL)
    assert looks is not None
    transform = create_transform(SIZE, interpolation=looks.interpolation, crop_pct=0.95, mean=looks.mean, std=looks.std)
    with torch.no_grad():
        return classifier.net(transform(Image.open(file).convert("RGB"))[None])[0]


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (3, 2), (100, 0)])
def test_counts_are_exact(tmp_path: Path, classifier: Classifier, batch: int, workers: int) -> None:
    """Images of every kind, each with its own place in timm's ranking as the right answer; two cannot be read."""
    ranks = [0, 4, 5, 999, 0, 1, 3, 0, 17, 4]
    kinds = list(KINDS) * 2
    files = [jpeg(tmp_path / f"{i}.JPEG", i, KINDS[kind], kind.partition(",")[0]) for i, kind in enumerate(kinds)]
    answers = [(int(logits_of_timm(classifier, file).argsort(descending=True)[rank]),) for file, rank in zip(files, ranks, strict=True)]
    whole = EvaluationSet("imagenet", files, answers, list(range(CLASSES)))
    found = evaluate.evaluate(classifier, whole, VIEW, batch, workers)
    assert (found.images, found.top1, found.top5, found.unreadable) == (10, 3, 7, [])


def test_only_the_sets_classes_count(tmp_path: Path, classifier: Classifier) -> None:
    file = jpeg(tmp_path / "a.JPEG")
    order = logits_of_timm(classifier, file).argsort(descending=True).tolist()
    images = EvaluationSet("a", [file] * 2, [(order[20],), (order[30],)], sorted(order[20:]))
    found = evaluate.evaluate(classifier, images, VIEW, 2, 0)
    assert (found.images, found.top1, found.top5) == (2, 1, 1)


def test_unreadable_images_are_counted_and_named(tmp_path: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [jpeg(tmp_path / f"{i}.JPEG", i) for i in range(6)]
    Path(files[1]).write_bytes(b"no image")
    Path(files[4]).write_bytes(Path(files[4]).read_bytes()[:200])
    answers = [(int(logits_of_timm(classifier, files[i]).argmax()) if i not in (1, 4) else 0,) for i in range(6)]
    images = EvaluationSet("sketch", files, answers, list(range(CLASSES)))
    with refused("--data sketch", "2: ", files[1], files[4], "at most 1 % of 6 images", "restore these files"):
        evaluate.evaluate(classifier, images, VIEW, 2, 0)
    monkeypatch.setattr(evaluate, "UNREADABLE", 0.5)
    found = evaluate.evaluate(classifier, images, VIEW, 1, 0)  # also a batch of which nothing is left
    assert (found.images, found.top1, found.top5, found.unreadable) == (4, 4, 4, [files[1], files[4]])


def test_weights_without_finite_logits_are_refused(tmp_path: Path) -> None:
    broken = build(MODEL, CLASSES, 3, SIZE)
    torch.nn.init.constant_(broken.net.get_parameter("head.bias"), float("nan"))
    images = EvaluationSet("a", [jpeg(tmp_path / "a.JPEG")], [(0,)], [0, 1])
    with pytest.raises(Refused, match=r"--data a: found logits that are not finite; .* choose another checkpoint"):
        evaluate.evaluate(broken, images, VIEW, 1, 0)


# Beside what was announced


def test_what_the_authors_announced() -> None:
    numbers = published.read_published(tiny.ROOT)
    assert published.announced(numbers, "resnet50") == pytest.approx({"top1": 0.8308, "top5": 0.9635})
    assert published.announced(numbers, "vit_tiny_patch16_224") == pytest.approx({"top1": 0.7811, "top5": 0.9426})
    assert published.announced(numbers, "vit_small_patch16_224")["top1"] == pytest.approx(0.8433)
    assert published.announced(numbers, "convnextv2_tiny")["top1"] == pytest.approx(0.8503)  # the zoo's file, not the shorter training
    assert published.announced(numbers, "beitv2_base_patch16_224")["top1"] == pytest.approx(0.865)
    assert published.announced(numbers, "resnet18") == {}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, arguments)])
    evaluate.main()


def test_the_command(
    data: Path, favouring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every set: what ``FIRST`` makes of it, by hand."""
    monkeypatch.chdir(tiny.ROOT)
    folders = {name: data / name for name in ("imagenet", "v2", "a", "r")} | {
        "real": data / "imagenet",
        "sketch": data / "imagenet" / "val",
    }
    options = ["--size", SIZE, "--workers", 2, "--real-labels", data / "real.json", "--csv", tmp_path / "table.csv"]
    command(monkeypatch, MODEL, favouring, *[f"--data={name}={folder}" for name, folder in folders.items()], *options)
    found = pd.read_csv(tmp_path / "table.csv").set_index("set")
    subset = {name: set(evaluation_sets._packed(f"imagenet_{name}_synsets.txt").split()) for name in ("a", "r")}
    among = {name: [label for label in FIRST if WNIDS[label] in wnids] for name, wnids in subset.items()}
    assert 0 < len(among["a"]) < 5
    counts = found[["images", "top1_correct", "top5_correct", "unreadable"]].T.to_dict("list")
    assert counts["imagenet"] == counts["v2"] == counts["sketch"] == [1002, 3, 7, 0]
    assert counts["real"] == [3, 1, 2, 0]
    # Behind the favoured ones all logits are equal: the lowest classes of the set fill its first five.
    assert counts["a"] == [201, 1 + (among["a"][0] == 6), 5 + 1, 0]
    assert counts["r"][0::3] == [200, 0]
    assert counts["r"][2] == 5
    assert found.loc["imagenet", "top1"] == pytest.approx(3 / 1002, abs=1e-6)
    assert found.loc["imagenet", "top1_published"] == pytest.approx(0.7811)
    assert found.drop("imagenet")[["top1_published", "top5_published"]].isna().all(axis=None)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| imagenet"))
    assert re.findall(r"[\d.]+", line) == ["1002", "0", "0.30", "78.11", "0.70", "94.26"]


def test_the_command_outside_of_the_project(
    data: Path, favouring: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (data / "a" / WNIDS[6] / "2.jpg").write_bytes(b"no image")
    command(monkeypatch, MODEL, favouring, f"--data=a={data / 'a'}", "--size", SIZE, "--workers", 0)
    shown = capsys.readouterr()
    assert "nothing is published here" in shown.err
    assert f"--data a: 1 unreadable: {data / 'a' / WNIDS[6] / '2.jpg'}" in shown.err
    assert pd.read_csv(tmp_path / "evaluation.csv")["unreadable"].tolist() == [1]
    (data / "a" / WNIDS[6] / "2.jpg").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnt50", "{file}", "--data=a=x"], r"^MODEL: found 'resnt50'; allowed: a timm model"),
        ([MODEL, "nowhere.pth", "--data=a=x"], r"^CHECKPOINT: found 'nowhere.pth'; allowed: .*; correct the path$"),
        ([MODEL, "{file}", "--data=a"], r"^--data: found 'a'; allowed: NAME=FOLDER, each name once: imagenet, real"),
        ([MODEL, "{file}", "--data=a=x", "--data=a=y"], r"^--data: found 'a=y'"),
        ([MODEL, "{file}", "--data=b=x"], r"^--data: found 'b'; allowed: a, imagenet"),
        ([MODEL, "{file}", "--data=a=x", "--crop=0"], r"^--crop: found 0.0"),
        ([MODEL, "{file}", "--data=a=x", "--batch-size=0"], r"^--batch-size: found 0; allowed: at least 1"),
        ([MODEL, "{file}", "--data=a=x", "--workers=-1"], r"^--workers: found -1"),
        ([MODEL, "{file}", "--data=a=x", "--size=0"], r"^--size: found 0"),
        ([MODEL, "{file}", "--data=a={data}", "--size=8"], r"^--size: found 'vit_tiny.*' with images of 8 px"),
        (["kd_resnet8_w8_s1", "{file}", "--data=a={data}"], r"^CHECKPOINT: found .*looks like a ViT in timm's layout, 12 blocks, 192"),
    ],
)
def test_what_the_command_refuses(data: Path, favouring: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    filled = [argument.format(file=favouring, data=data / "a") for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, *filled)
