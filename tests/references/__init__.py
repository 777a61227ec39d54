"""Every method again: slowly, in float64 NumPy, from its paper and not from kdlib: ``tests/references/<name>.py``.

Each file has

- ``terms(student, teacher, given, own, *, <parameters>)``: the method's own terms, before weight and warm-up. ``student``, ``teacher``
  and ``given`` are ``common.Said`` and ``common.Given``; ``own`` holds the method's parameters and buffers by name, as arrays;
- ``HOLDS``: which of the claims below hold. Both ways: a claim that is left out must fail to hold;
- ``CHOSEN``: values for those parameters that cannot have just any value > 0.
"""

from importlib import import_module
from types import ModuleType

CLAIMS = {
    "zero_at_teacher",  # value and gradient are 0 where the student says what the teacher says
    "shift_invariant",  # a constant added to all logits of an image changes nothing
    "order_invariant",  # the order of the images in the batch is no matter
}


def of(name: str) -> ModuleType:
    """A method's reference. Raises ModuleNotFoundError, with what to do, for one that has none."""
    try:
        module = import_module(f"tests.references.{name}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"write {name} from its paper into tests/references/{name}.py") from error
    assert module.HOLDS <= CLAIMS
    return module
