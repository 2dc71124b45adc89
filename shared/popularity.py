"""Popularity from daily counts: one function serves the fallback, the baselines and, later, features."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Final
from weakref import proxy

import numpy as np

from shared.columns import narrow
from shared.events import IntArray
from shared.times import DAY

RECENT_DAYS: Final = 30
KEPT: Final = 16 << 20
"""Bytes of orders kept for questions about other days: today's and, as a rule, some more."""


class Popularity:
    """How often each item occurred, by day.

    Rows are sorted by day; `day` counts days since 1970, UTC. Counts come from training events alone.
    """

    def __init__(self, day: IntArray, item: IntArray, count: IntArray, item_count: int) -> None:
        first = np.flatnonzero(np.diff(day, prepend=day[:1] - 1))
        self.days = day[first]  # (D,) each once, ascending
        self.starts = np.append(first, len(day))  # (D + 1,): rows of day d are starts[d] up to starts[d + 1]
        self.item, self.count, self.item_count = narrow(item), narrow(count), item_count
        # Of a weak reference: whoever refers to himself is freed by the collector of garbage alone, and bundles are
        # kept out of its reach.
        orders = max(2, min(64, KEPT // (8 * (item_count + 1))))
        self.ranked = lru_cache(maxsize=orders)(partial(Popularity._ranked, proxy(self)))

    @classmethod
    def of_events(cls, item: IntArray, timestamp: IntArray, item_count: int) -> Popularity:
        """Count events; `item` holds item indices (E,), `timestamp` epoch microseconds (E,)."""
        # One number a pair: sorting those takes a tenth of the time of sorting pairs.
        pairs, count = np.unique(timestamp // DAY * (item_count + 1) + item, return_counts=True)
        day, items = np.divmod(pairs, item_count + 1)
        return cls(day, items, count.astype(np.int64), item_count)

    def popular(self, as_of: int, window: int | None = None) -> IntArray:
        """Events per item in the `window` days before the day of `as_of` (all days before it without window).

        Returns (N + 1,), indexed by item index. Only whole days that ended before `as_of` count, so
        nothing from the future of `as_of` does.
        """
        end = as_of // DAY
        lo = 0 if window is None else self.starts[self.days.searchsorted(end - window)]
        hi = self.starts[self.days.searchsorted(end)]
        return np.bincount(self.item[lo:hi], self.count[lo:hi], self.item_count + 1).astype(np.int64)

    @property
    def day(self) -> IntArray:
        """(R,) of each row."""
        return np.repeat(self.days, np.diff(self.starts))

    def fallback(self, as_of: int) -> IntArray:
        """All item indices, most popular first, for a user about whom nothing is known at `as_of`.

        Counts of the last 30 days decide, then all-time counts, then the index. After the end of the
        data the last 30 days of data count: a bundle does not forget what is popular by getting older.
        """
        return self.ranked(min(as_of // DAY, self.end))

    def is_latest(self, as_of: int) -> bool:
        """Whether all data count at `as_of`, as they do for all who ask about now."""
        return as_of // DAY >= self.end

    @property
    def end(self) -> int:
        """The day after the last one with data; 0 without data."""
        return int(self.days[-1]) + 1 if len(self.days) else 0

    def _ranked(self, day: int) -> IntArray:
        recent, ever = self.popular(day * DAY, RECENT_DAYS)[1:], self.popular(day * DAY)[1:]
        return np.lexsort((-ever, -recent)) + 1  # (N,) stable: ties by index
