"""Work for the next turn while this one is going on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(make: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[tuple[Item, Result]]:
    """Yield ``(item, make(item))`` in order. With ``threads`` > 0 the next result is prepared in a background thread.

    That thread computes with so many of torch's threads; ``items`` is then asked for one more than has been yielded.
    """
    if not threads:
        yield from ((item, make(item)) for item in items)
        return
    # OpenMP counts threads for each thread that asks: this one's number is not changed
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        waiting = None
        for item in items:
            following = item, pool.submit(make, item)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()
