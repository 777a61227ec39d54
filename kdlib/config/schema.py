"""The form of params.yaml: its sections, their keys, and the type and range of every value.

No behaviour: a run's fingerprint holds the values, and not the code of this file.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # results/runs.csv holds it in 64 bits
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
HeldOut = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Pixels = Annotated[int, Field(ge=8, le=1024)]


class Digits(Section):
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 (UCI optdigits test set)."""

    source: Literal["digits"]
    val_fraction: HeldOut  # of all images
    test_fraction: HeldOut
    seed: Seed  # draws the stratified split
    hflip: Share  # probability that a training view is mirrored


class Fractals(Section):
    """Iterated function systems: a class is a system, an image is a jittered rendering of it."""

    source: Literal["fractals"]
    classes: Annotated[int, Field(ge=2)]
    train_per_class: Count
    val_per_class: Count
    test_per_class: Count
    size: Pixels
    jitter: Share  # how far an image's system may lie from its class's
    points: Count  # of the chaos game, per image
    seed: Seed
    hflip: Share


class Cifar100(Section):
    """CIFAR-100 in its python pickles, as torchvision reads them."""

    source: Literal["cifar100"]
    path: str
    download: bool
    val_fraction: HeldOut  # of the official training split; the official test split is the test split
    seed: Seed
    hflip: Share


class Folder(Section):
    """One folder per class, images below it, as timm's folder reader finds them."""

    source: Literal["folder"]
    path: str
    size: Pixels  # images are decoded once to size x size
    val_fraction: HeldOut
    test_fraction: HeldOut
    seed: Seed
    hflip: Share


class Imagenet(Section):
    """ImageNet-1k unpacked as torchvision's ImageNet expects it: train/<wnid>/ and val/<wnid>/."""

    source: Literal["imagenet"]
    path: str
    size: Pixels
    val_fraction: HeldOut  # of the official training split; the official validation split is the test split
    seed: Seed
    hflip: Share


class Originals(Section):
    """ImageNet, or what is laid out like it, left in its files: each view is cut out of the original image, as published recipes do."""

    source: Literal["originals"]
    path: str  # holds train/ and val/; may name an environment variable: $IMAGENET
    stored: Literal["folders", "shards", "huggingface"]  # train/<class>/<image>, webdataset's train/*.tar, what save_to_disk wrote
    class_map: str | None  # a file with the classes in their order, one in a line; null: natural order of folders, datasets' own
    size: Pixels  # of views
    crop_pct: Fraction  # evaluation resizes the short side to size / crop_pct and cuts out the centre
    unreadable: Share  # of all images: so many may be damaged, and are left out
    val_fraction: HeldOut  # of train/; val/ is the test split
    seed: Seed
    hflip: Share


DataSource = Annotated[Digits | Fractals | Cifar100 | Folder | Imagenet | Originals, Field(discriminator="source")]
SOURCES: dict[str, type[Section]] = {form.__name__.lower(): form for form in (Digits, Fractals, Cifar100, Folder, Imagenet, Originals)}


class RandAugmentParams(Section):
    """Cubuk et al., CVPRW 2020, in timm's terms: ``rand-m<magnitude>-n<operations>-mstd<magnitude_std>``."""

    operations: Annotated[int, Field(ge=0, le=10)]  # 0 switches it off
    magnitude: Annotated[float, Field(ge=0, le=10)]
    magnitude_std: NonNegative


class Recipe(Section):
    """How any student is trained."""

    epochs: Positive  # passes over the *whole* training split; a fraction of it is passed over more often
    batch_size: Annotated[int, Field(ge=2)]
    group_size: Annotated[int, Field(ge=2)] | None  # of a mix group (see kdlib.views.stream); divides the batch; null: all of it
    repeats: Count  # views of an image in a row (repeated augmentation)
    optimizer: str  # timm's name
    learning_rate: Positive
    weight_decay: NonNegative
    clip_norm: NonNegative  # of the gradient of student and adapters together; 0 switches it off
    warmup: Annotated[float, Field(ge=0, lt=1)]  # share of all steps, linear from warmup_lr; then a cosine to min_lr
    warmup_lr: NonNegative
    min_lr: NonNegative
    milestones: list[Annotated[float, Field(gt=0, lt=1)]]  # shares of all steps at which the rate falls to a tenth; []: the cosine
    ema: list[Annotated[float, Field(gt=0, lt=1)]]  # decays of averaged weights, which are measured too
    hard_loss: Literal["ce", "bce", "none"]  # none: the teacher alone, whatever hard_weight says
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    crop_padding: Share  # shifts by up to this share of the image side
    crop_min_area: Fraction  # resized crops of at least this share of the image; 1 switches them off
    mixup_alpha: NonNegative  # 0 switches it off
    cutmix_alpha: NonNegative
    randaugment: RandAugmentParams
    erasing: Share  # probability that a box of a view is grey
    augment: Literal["batched", "timm"]  # crops and RandAugment: of a whole batch at once, or by timm's transforms on PIL images


class TeacherParams(Section):
    """Trained here by a recipe, or loaded from a checkpoint of the named model."""

    data: str
    model: str
    size: Pixels | None  # of the images that it looks at, which are resized to it; null: as the data set has them
    recipe: str
    seed: Seed
    checkpoint: str | None  # a .safetensors or .pth file of this model; null trains it
    min_top1: Share  # on the test split; nobody learns from a teacher below it


class Sweep(Section):
    """A grid of each method's parameters, tried at one seed; the validation split chooses one point for each method."""

    seed: Seed
    grids: dict[str, dict[str, list[float]]]


class Comparison(Section):
    """Everything fixed but method and seed."""

    data: str
    fraction: Fraction
    subset_seed: Seed | None  # draws which images the fraction holds, the same for every run; null: each run's own seed does
    teacher: str
    student: str
    recipe: str
    methods: list[str]
    sweep: Sweep | None


class Headline(Section):
    """Which comparisons the main table is about: this data set, every fraction, under these recipes."""

    data: str
    recipes: Annotated[list[str], Field(min_length=1, max_length=2)]  # of two the first is the weaker; one has no other to be compared with


class Launch(Section):
    """Processes that train one run together, by distributed data parallelism; each takes whole mix groups."""

    processes: Count  # on each machine: one for each GPU
    # machines that share the folder of the study, at the same path: the first runs it, the others `python -m kdlib.study join`
    nodes: Count
    rendezvous: str | None  # host:port of the first, where there are several


class ComputeParams(Section):
    """How models compute; ``auto``: what pays on the device, and each run records what that was."""

    precision: Literal["auto", "fp32", "bf16"]
    # a student with its loss; graphs: as CUDA graphs too, for nets whose kernels are too short
    compile: Literal["auto", True, False, "graphs"]
    resident: Literal["auto", True, False]  # all training images in the memory of the device
    # the next views and answers while the students train, by half of a run's threads; refused on a GPU, which works beside the host anyway
    ahead: Literal["auto", True, False]


class Rows(Section):
    """Of results/published/results.csv."""

    table: str
    where: dict[str, str]  # columns of the file and their values: what tells its rows from the others of the table


class Published(Section):
    """What is public about a comparison."""

    rows: list[Rows]  # that it repeats
    settings: Literal["verified", "assumed"]  # assumed: no public source gives all of them, and nobody can say whether a number was met


class StudyParams(Section):
    seeds: Annotated[list[Seed], Field(min_length=1)]
    baseline: str
    challengers: list[str]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    on_divergence: Literal["continue", "fail"]
    missing: Literal["fail", "blank"]  # comparisons that were not made yet: no tables at all, or tables of the others
    checkpoint_seconds: NonNegative
    answers_gb: NonNegative  # that a teacher's answers to one seed's views may take on the disk; above it they are asked each time
    launch: Launch
    compute: ComputeParams
    tables: Annotated[list[str], Field(min_length=1)]  # the first is the README's
    headline: Headline
    published: dict[str, Published]  # by comparison


class Params(Section):
    """All of params.yaml."""

    study: StudyParams
    data: dict[str, DataSource]
    teachers: dict[str, TeacherParams]
    recipes: dict[str, Recipe]
    methods: dict[str, dict[str, float]]
    comparisons: Annotated[dict[str, Comparison], Field(min_length=1)]


# What study.tables may name: kdlib.study.report.build makes them.
TABLES = ("published", "data_scale", "recipes", "tuning", "methods", "losses", "cost", "measures")

# Where each part stands, without the names that people choose; the sources of data are told apart by their ``source``.
SECTIONS: dict[str, type[Section]] = {
    "": Params,
    "study": StudyParams,
    "study.headline": Headline,
    "study.published": Published,
    "study.published.rows": Rows,
    "study.launch": Launch,
    "study.compute": ComputeParams,
    "teachers": TeacherParams,
    "recipes": Recipe,
    "recipes.randaugment": RandAugmentParams,
    "comparisons": Comparison,
    "comparisons.sweep": Sweep,
}
