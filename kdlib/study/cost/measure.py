"""A few steps of the engine, to know what all of them will cost: seconds and memory on this device, bytes of what is written."""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import save

from kdlib.data.lazy_images import LazyImages
from kdlib.decoding.pool import pool, spare
from kdlib.engine.backend import choose_backend, fastest_teacher
from kdlib.engine.learner import Job, Learner, asked_of_teacher
from kdlib.engine.loop import TrainingLoop
from kdlib.engine.metrics import EVALUATION_BATCH, predict
from kdlib.engine.probe import peak_bytes
from kdlib.engine.record import forward_flops, weights
from kdlib.engine.setting import Images, Setting, begin, view_stream
from kdlib.engine.teacher_cache import TeacherCache
from kdlib.losses.base import Method
from kdlib.study.cost.estimate import Cost, extrapolated
from kdlib.views.mixup import mix_groups
from kdlib.views.stream import ViewStream

Methods = Mapping[str, Callable[[], Method]]  # by the name of the run
WARM_UP = 2  # steps: kernels are chosen and an optimiser's state is made in the first, all is in its place in the second
CPU_STEP = 4e10  # operations of a step that is tried on a CPU, at most: about a second of one core


class Trial:
    """The runs of a setting at their first step."""

    def __init__(self, setting: Setting, methods: Methods) -> None:
        images: Images = setting.data.train.images
        jobs = [Job(name, make, False, Path()) for name, make in methods.items()]
        self.asks = asked_of_teacher(job.method() for job in jobs)
        size = None if isinstance(images, LazyImages) else images.nbytes
        backend = choose_backend(setting.compute, setting.device, setting.recipe, setting.total_steps, size, self.asks)
        backend = replace(backend, kinds=backend.kinds[:1])  # to find out which is the quickest takes a minute
        self.setting, self.ahead = setting, backend.ahead
        self.learners = [begin(setting, job, backend) for job in jobs]
        if backend.resident:
            images = torch.randint(256, images.shape, dtype=torch.uint8, device=setting.device)  # type: ignore[union-attr]
        self.stream = view_stream(setting, images)
        self.teacher = setting.teacher if self.asks else None
        if self.teacher:
            self.teacher = fastest_teacher(self.teacher, backend, self.stream.batch(0).images, self.asks)

    def go(self, steps: int, ahead: int) -> float:
        """So many more steps, as the engine takes them. Returns the seconds of one."""
        for learner in self.learners:
            learner.total_steps = learner.step + steps
        cache = TeacherCache(self.teacher, None, self.setting.recipe.batch_size, 1) if self.teacher else None
        loop = TrainingLoop(self.learners, self.stream, cache, lambda _: 0.0, lambda _: None, float("inf"), self.setting.title, ahead)
        return self.seconds(loop.run) / steps

    def advance(self) -> None:
        """All optimisers' steps alone, by the gradients that there are."""
        for learner in self.learners:
            learner.advance()

    def seconds(self, do: Callable[[], object]) -> float:
        wait = torch.get_device_module(self.setting.device).synchronize
        wait()
        started = time.perf_counter()
        do()
        wait()
        return time.perf_counter() - started


def sizes(setting: Setting, methods: Methods) -> Cost:
    """What it costs to train these together as far as nothing has to be timed: operations, and bytes on the disk."""
    recipe, shape = setting.recipe, (setting.data.channels, setting.data.size)
    trial = Trial(_in_groups(setting, 2), methods)
    for learner in trial.learners:
        for parameter in (*learner.student.parameters(), *learner.method.parameters()):
            parameter.grad = torch.zeros_like(parameter)
    trial.advance()  # an optimiser has its state after its first step
    teacher = trial.teacher
    return Cost(
        learners=len(trial.learners),
        student_flops=forward_flops(trial.learners[0].student, *shape),
        teacher_flops=forward_flops(teacher, *shape) if teacher else 0,
        checkpoint_bytes=sum(checkpoint_bytes(learner) for learner in trial.learners),
        weights_bytes=sum((1 + len(recipe.ema)) * len(save(weights(learner.student))) for learner in trial.learners),
        answers_bytes=TeacherCache(teacher, None, _group(setting), 1).bytes(mix_groups(recipe), trial.asks) if teacher else 0,
    )


def cost(setting: Setting, methods: Methods, steps: int, processes: int) -> Cost:
    """What it costs to train these together, from so many steps: of one of so many processes, which are taken not to wait for each other.

    Nothing is compiled where that is to be found out. On a CPU a mix group that would take many seconds is tried with fewer images, and
    the memory of the whole one is extrapolated from two such sizes. Nothing is measured with 0 steps, nor where the device's memory is
    too small.
    """
    found = sizes(setting, methods)
    images = _tried(setting, found)
    begun = _begun(setting, methods, images) if steps else None
    if begun is None:
        return found
    peak, trial = begun
    step = trial.go(steps, trial.ahead)
    update = min(trial.seconds(trial.advance) for _ in range(steps))
    del begun, trial
    # the optimisers' step is one for all images of a batch
    seconds = (step - update) / images + update / (setting.recipe.batch_size // processes)
    return replace(found, seconds=seconds, peak_bytes=_of_whole_group(setting, methods, images, peak))


def memory(setting: Setting, methods: Methods, found: Cost) -> int | None:
    """Peak memory of one process, or None if it is more than the device has. ``found``: their operations."""
    images = _tried(setting, found)
    begun = _begun(setting, methods, images)
    return None if begun is None else _of_whole_group(setting, methods, images, begun[0])


def decoding(stream: ViewStream, processes: int, nodes: int) -> float:
    """Seconds in which one of so many processes on each of so many machines gets a view of the stream out of original files.

    From one step of it, by all processes that decode here.
    """
    together = processes * nodes
    groups = range(mix_groups(stream.recipe) // together)
    stream.prefetch.ask(1, groups[:1])()  # starts them
    started = time.perf_counter()
    stream.prefetch.ask(0, groups)()
    of_one = (time.perf_counter() - started) * max(1, len(pool())) / (stream.recipe.batch_size // together)
    return of_one / max(1, spare(processes))


def room(device: torch.device) -> int:
    """Bytes of memory that a training on this device can have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(psutil.virtual_memory().available)


def checkpoint_bytes(learner: Learner) -> int:
    """Of the file that it is written to."""
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    return file.getbuffer().nbytes


def _begun(setting: Setting, methods: Methods, images: int) -> tuple[int, Trial] | None:
    """Peak memory of the first steps and of what is measured afterwards, and how it goes on; None where the device has not so much."""
    made = []

    def begin() -> None:
        made.append(Trial(_in_groups(setting, images), methods))
        made[0].go(WARM_UP, ahead=0)  # the CPU's memory is watched in this thread
        if setting.device.type == "cuda":  # on a CPU it would take minutes
            for model in (made[0].learners[0].student, *([setting.teacher] if setting.teacher else ())):
                predict(model, setting.data.val.images[:EVALUATION_BATCH], EVALUATION_BATCH, setting.device)

    there = sum(tensor.nbytes for tensor in setting.teacher.state_dict().values()) if setting.teacher else 0
    try:
        return there + peak_bytes(begin, setting.device), made[0]
    except torch.OutOfMemoryError:
        return None


def _of_whole_group(setting: Setting, methods: Methods, images: int, peak: int) -> int | None:
    """Peak memory with the setting's own mix groups, from that with so many images."""
    if images == _group(setting):
        return peak
    twice = _begun(setting, methods, 2 * images)
    return None if twice is None else extrapolated((images, peak), (2 * images, twice[0]), _group(setting))


def _tried(setting: Setting, found: Cost) -> int:
    """Images of a mix group that is tried."""
    return _group(setting) if setting.device.type != "cpu" else min(_group(setting), max(2, int(CPU_STEP / found.operations)))


def _group(setting: Setting) -> int:
    return setting.recipe.batch_size // mix_groups(setting.recipe)


def _in_groups(setting: Setting, images: int) -> Setting:
    """With one mix group of so many images for a batch: the unit that fills a device."""
    return replace(setting, recipe=setting.recipe.model_copy(update={"batch_size": images, "group_size": None}))
