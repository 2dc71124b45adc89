"""Requests that wait at the same time are served together.

Redis answers many reads in one exchange, so several histories arrive in one turn of the event loop. One call of the
network for all of them costs less than one each, one product of matrices less than several with a vector, and what is
done several times in a row finds its code and data in the processor's caches. Nobody waits for company: a job is done
at the end of the turn in which it came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

By = TypeVar("By", bound=Hashable)
Job = TypeVar("Job")
Result = TypeVar("Result")


class Coalescer(Generic[By, Job, Result]):
    """Does the jobs of one event loop: those `by` the same means together, `most` at a time."""

    def __init__(self, work: Callable[[By, Sequence[Job]], Sequence[Result]], most: int) -> None:
        self.coming = 0  # jobs that may come in this turn: whoever counts them tells us
        self._work, self._most = work, most
        self._waiting: dict[By, list[tuple[Job, asyncio.Future[Result]]]] = {}

    async def join(self, by: By, job: Job) -> Result:
        """The result of one job."""
        if not self.coming and not self._waiting:
            return self._work(by, [job])[0]
        loop = asyncio.get_running_loop()
        if (waiting := self._waiting.get(by)) is None:
            waiting = self._waiting[by] = []
            loop.call_soon(self._serve, by)
        mine: asyncio.Future[Result] = loop.create_future()
        waiting.append((job, mine))
        return await mine

    def _serve(self, by: By) -> None:
        waiting = self._waiting.pop(by)
        if rest := waiting[self._most :]:  # the loop has its turn between two
            self._waiting[by] = rest
            asyncio.get_running_loop().call_soon(self._serve, by)
        served = [(job, mine) for job, mine in waiting[: self._most] if not mine.done()]  # others have hung up
        if not served:
            return
        try:
            results = self._work(by, [job for job, _ in served])
        except Exception as error:  # each of them has to know
            for _, mine in served:
                mine.set_exception(error)
            return
        for (_, mine), result in zip(served, results, strict=True):
            mine.set_result(result)
