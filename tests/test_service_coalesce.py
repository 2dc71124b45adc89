"""Jobs that wait at the same time are done together, and each gets its own result."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.coalesce import Coalescer

MOST = 4


class Work:
    """Doubles numbers; it notes who came together."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def __call__(self, by: str, jobs: Sequence[int]) -> list[int]:
        self.calls.append((by, list(jobs)))
        if by == "broken":
            raise ArithmeticError("no")
        return [2 * job for job in jobs]


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def busy(work: Work) -> Coalescer[str, int, int]:
    """Somebody else is about to come."""
    coalescer: Coalescer[str, int, int] = Coalescer(work, MOST)
    coalescer.coming = 1
    return coalescer


async def test_who_waits_at_the_same_time_goes_together(busy: Coalescer[str, int, int], work: Work) -> None:
    jobs = list(range(2 * MOST + 1))
    assert await asyncio.gather(*(busy.join("a", job) for job in jobs)) == [2 * job for job in jobs]
    assert work.calls == [("a", [0, 1, 2, 3]), ("a", [4, 5, 6, 7]), ("a", [8])]
    assert await busy.join("a", 3) == 6


async def test_who_is_alone_does_not_wait(work: Work) -> None:
    coalescer: Coalescer[str, int, int] = Coalescer(work, MOST)
    with pytest.raises(StopIteration, match="10"):  # the end, without giving way to the loop
        coalescer.join("a", 5).send(None)


async def test_only_who_needs_the_same_goes_together(busy: Coalescer[str, int, int], work: Work) -> None:
    assert list(await asyncio.gather(busy.join("a", 1), busy.join("b", 2), busy.join("a", 3))) == [2, 4, 6]
    assert work.calls == [("a", [1, 3]), ("b", [2])]


async def test_a_failure_is_told_to_each_and_nobody_waits_for_ever(busy: Coalescer[str, int, int]) -> None:
    found = await asyncio.gather(busy.join("broken", 1), busy.join("broken", 2), return_exceptions=True)
    assert [type(error) for error in found] == [ArithmeticError, ArithmeticError]
    assert await busy.join("a", 4) == 8


async def test_who_hangs_up_leaves_the_others_alone(busy: Coalescer[str, int, int], work: Work) -> None:
    tasks = [asyncio.create_task(busy.join("a", i)) for i in (1, 2, 3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert (found[0], found[2]) == (2, 6)
    assert isinstance(found[1], asyncio.CancelledError)
    assert work.calls == [("a", [1, 3])]
