"""Microseconds of one call: the median of calls one after another, with different arguments, as warm as it can be."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle
from typing import Any


def median_us(call: Callable[..., object], arguments: Sequence[tuple[Any, ...]], seconds: float) -> float:
    """Of a function, called with each of the arguments in turn for so many seconds."""
    took = []
    for given in _in_turn(arguments, seconds):
        started = time.perf_counter_ns()
        call(*given)
        took.append(time.perf_counter_ns() - started)
    return statistics.median(took) / 1000


async def median_us_of(
    call: Callable[..., Awaitable[object]], arguments: Sequence[tuple[Any, ...]], seconds: float
) -> float:
    """Of a coroutine function."""
    took = []
    for given in _in_turn(arguments, seconds):
        started = time.perf_counter_ns()
        await call(*given)
        took.append(time.perf_counter_ns() - started)
    return statistics.median(took) / 1000


def _in_turn(arguments: Sequence[tuple[Any, ...]], seconds: float) -> Iterator[tuple[Any, ...]]:
    until = time.perf_counter() + seconds
    for count, given in enumerate(cycle(arguments)):
        if count >= 20 and time.perf_counter() > until:
            return
        yield given
