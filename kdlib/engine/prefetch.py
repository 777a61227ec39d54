"""Work for the next turn while this one is going on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Place = TypeVar("Place")
Made = TypeVar("Made")


def prefetch(
    make: Callable[[Place], Made], places: Iterable[Place], threads: int, device: torch.device | str
) -> Iterator[tuple[Place, Made]]:
    """What ``make`` makes of each place, in order. With ``threads`` > 0 a thread makes the next one, with so many of torch's threads of
    its own and in a stream of its own, while the caller works on this one; ``places`` is then asked for one more than the caller has been
    given.
    """
    if not threads:
        yield from ((place, make(place)) for place in places)
        return
    streams = torch.get_device_module(device)  # a CPU has one that does nothing
    aside = streams.Stream()

    def make_aside(place: Place, after: Any) -> tuple[Made, Any]:
        with streams.stream(aside):
            # what is made here may lie where the turn before this one lay: memory is taken from, and goes back to, this stream alone
            aside.wait_event(after)
            return make(place), aside.record_event()

    # OpenMP counts threads for each thread that asks: this one's number is not changed
    with ThreadPoolExecutor(1, initializer=_begin, initargs=(threads, streams, streams.current_device())) as pool:
        waiting = None
        for place in places:
            following = place, pool.submit(make_aside, place, streams.current_stream().record_event())
            if waiting:
                yield _made(streams, *waiting)
            waiting = following
        if waiting:
            yield _made(streams, *waiting)


def _begin(threads: int, streams: Any, number: int | str) -> None:
    torch.set_num_threads(threads)
    streams.set_device(number)  # a new thread would work on the first one


def _made(streams: Any, place: Place, found: Future[tuple[Made, Any]]) -> tuple[Place, Made]:
    made, event = found.result()
    streams.current_stream().wait_event(event)
    return place, made
