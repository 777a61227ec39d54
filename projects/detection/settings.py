"""params.yaml of this project as frozen, typed objects."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from kdlib import config
from kdlib.config.schema import Count, Fraction, Launch, NonNegative, Positive, Section, Seed, Share
from kdlib.errors import known, refuse
from kdlib.study.training.checks import check_machines


class General(Section):
    checkpoint_seconds: NonNegative
    workers: Annotated[int, Field(ge=0)]  # processes that decode images, for each GPU; with 0 the one that trains decodes
    launch: Launch


class Coco(Section):
    """Paths, absolute or from the folder of params.yaml."""

    train_images: str  # a folder
    train_annotations: str  # instances_*.json
    val_images: str
    val_annotations: str


class Recipe(Section):
    """How a detector is trained."""

    detector: Literal["mask_rcnn", "cascade_mask_rcnn"]
    settings: Literal["verified", "assumed"]  # whether all of it is in results/published/coco_recipes.csv
    epochs: Count
    batch_size: Count  # images of a step
    group_size: Count  # images on one device at a time: the unit of BatchNorm; divides the batch
    optimizer: Literal["sgd", "adamw"]
    learning_rate: Positive  # after the warm-up
    momentum: Annotated[float, Field(ge=0, lt=1)]  # of SGD; AdamW's beta1 (its beta2 is 0.999)
    weight_decay: NonNegative
    decay_all: bool  # biases and norms too
    layer_decay: Fraction  # of the learning rate, from each layer of the backbone to the one below it; 1 switches it off
    layers: Count | None  # of the backbone, for layer_decay; the third stage has all but three of them
    steps: list[Count]  # after each of these epochs the learning rate falls to a tenth
    warmup_steps: Annotated[int, Field(ge=0)]  # linear
    warmup_start: Share  # of the learning rate, at the first step
    frozen_stages: Annotated[int, Field(ge=0, le=4)]  # and the stem, if there is one; their BatchNorm stays as it is
    sync_norm: bool  # BatchNorm over the images of all GPUs
    output_norms: bool  # a LayerNorm on each of the backbone's maps
    drop_path: Annotated[float, Field(ge=0, lt=1)]
    loss_scale: NonNegative  # the first one, of fp16; 0 trains in fp32. A CPU always does
    short_sides: Annotated[list[Count], Field(min_length=1)]  # in pixels; one is drawn for each view, the last is that of evaluation
    long_side: Count  # at most
    flip: Share
    crop: Annotated[list[Count], Field(min_length=2, max_length=2)] | None  # range of the sides in pixels; of every other view
    crop_sides: list[Count]  # short sides before such a crop

    @property
    def groups(self) -> int:
        """Number of groups in a batch."""
        return self.batch_size // self.group_size


class Run(Section):
    model: str  # timm's name
    weights: str | None  # a .safetensors or .pth file of this model, its classifier included or not; null: not pretrained
    recipe: str
    beside: str  # the recipe in results/published/results.csv, table11_coco, that it is compared with
    seed: Seed


class Params(Section):
    """All of params.yaml."""

    study: General
    coco: Coco
    recipes: dict[str, Recipe]
    runs: Annotated[dict[str, Run], Field(min_length=1)]


SECTIONS: dict[str, type[Section]] = {
    "": Params,
    "study": General,
    "study.launch": Launch,
    "coco": Coco,
    "recipes": Recipe,
    "runs": Run,
}


def load(root: Path) -> Params:
    """Read and check ``root/params.yaml``. Raises ``Refused`` with one line for the first thing that is wrong."""
    return parse(config.read_yaml(root))


def parse(content: dict[Any, Any]) -> Params:
    """Check types, ranges, names, and what depends on each other. Raises ``Refused``."""
    params = config.validate(Params, content, SECTIONS)
    launch = params.study.launch
    check_machines(launch)
    if launch.nodes > 1:
        raise refuse("study.launch.nodes", launch.nodes, "1", "a detector trains on the GPUs of one machine")
    for name, run in params.runs.items():
        known(f"runs.{name}.recipe", run.recipe, params.recipes)
    for name, recipe in params.recipes.items():
        _check_recipe(f"recipes.{name}", recipe, launch.processes)
    return params


def _check_recipe(key: str, recipe: Recipe, processes: int) -> None:
    if recipe.batch_size % recipe.group_size or recipe.groups % processes:
        allowed = f"a size whose groups make up batches of {recipe.batch_size} and can be shared out to {processes} processes"
        raise refuse(f"{key}.group_size", recipe.group_size, allowed, "change it, batch_size or study.launch")
    if (recipe.layers or 0) < 4 and recipe.layer_decay < 1:
        raise refuse(f"{key}.layers", recipe.layers, "4 or more where layer_decay is below 1", "add the number, 6 for a ConvNeXt-T")
    if recipe.crop and not (recipe.crop[0] <= recipe.crop[1] and recipe.crop_sides):
        raise refuse(f"{key}.crop", recipe.crop, "the lower limit, then the upper one, with crop_sides", "correct it")
