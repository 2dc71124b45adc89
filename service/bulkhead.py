"""A database that does not answer must not take the places of requests that need none of it.

A worker has so many requests in flight (`service.overload`). Each that waits for a hanging database keeps its place for
seconds, and a few dozen a second would keep them all: users whose histories are cached would be refused too. So while
there is no progress only FEW wait, and the rest are told at once what they would be told in the end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

FEW: Final = 32
SLOW: Final = 1.0
"""Seconds without an answer, after which the database seems to hang; less than anybody waits for it."""


class Bulkhead:
    """Those who wait for one kind of answer of the database."""

    def __init__(self) -> None:
        self.waiting = 0
        self._failed = False  # the last one who waited got no answer
        self._progress_at = 0.0  # monotonic seconds: the last answer, or since when anybody waits

    @property
    def is_shut(self) -> bool:
        """Whether enough wait already, for what may never come."""
        stalled = self._failed or time.monotonic() - self._progress_at > SLOW
        return self.waiting >= FEW and stalled

    @contextmanager
    def place(self, error: type[Exception]) -> Iterator[None]:
        """Wait in here. Raises `error` where that has no prospects; `error` raised inside means: no answer."""
        if self.is_shut:
            raise error("the database does not answer, and others wait for it already")
        if not self.waiting:
            self._progress_at = time.monotonic()
        self.waiting += 1
        try:
            yield
        except error:
            self._failed = True
            raise
        except Exception:  # refused, but by an answer
            self._answered()
            raise
        else:
            self._answered()
        finally:
            self.waiting -= 1

    def _answered(self) -> None:
        self._failed, self._progress_at = False, time.monotonic()
