"""Popularity from daily counts: only days that ended before the time asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.popularity import RECENT_DAYS, Popularity
from shared.times import DAY

NOON = DAY // 2


def of(*events: tuple[int, int], items: int = 3) -> Popularity:
    """Popularity of (day, item) pairs, each at noon."""
    days, found = zip(*events, strict=True)
    return Popularity.of_events(np.array(found, np.int64), np.array(days, np.int64) * DAY + NOON, items)


COUNTED = of((0, 1), (0, 1), (1, 2), (2, 1), (2, 3), (5, 3))


@pytest.mark.parametrize(
    ("as_of", "window", "wanted"),
    [
        (0, None, [0, 0, 0]),
        (1 * DAY - 1, None, [0, 0, 0]),  # the day of as_of is not over
        (1 * DAY, None, [2, 0, 0]),
        (2 * DAY + NOON, None, [2, 1, 0]),
        (3 * DAY, None, [3, 1, 1]),
        (99 * DAY, None, [3, 1, 2]),
        (3 * DAY, 1, [1, 0, 1]),  # day 2 alone
        (3 * DAY, 2, [1, 1, 1]),  # days 1 and 2
        (3 * DAY + NOON, 3, [3, 1, 1]),
        (6 * DAY, 1, [0, 0, 1]),
        (6 * DAY, 3, [0, 0, 1]),  # days 3, 4 and 5
        (6 * DAY, 4, [1, 0, 2]),
    ],
)
def test_counts_of_the_days_before(as_of: int, window: int | None, wanted: list[int]) -> None:
    assert COUNTED.popular(as_of, window).tolist() == [0, *wanted]


@given(
    st.lists(st.tuples(st.integers(-3 * DAY, 9 * DAY), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(-3 * DAY, 12 * DAY),
    st.one_of(st.none(), st.integers(1, 5)),
)
def test_equals_counting_by_hand(events: list[tuple[int, int]], as_of: int, window: int | None) -> None:
    times, items = (np.array(column, np.int64) for column in zip(*events, strict=True))
    end = as_of // DAY
    first = -(10**9) if window is None else end - window
    wanted = [0] * 5
    for time, item in events:
        wanted[item] += first <= time // DAY < end
    assert Popularity.of_events(items, times, 4).popular(as_of, window).tolist() == wanted


def test_recent_counts_rank_before_all_time_counts_and_ties_by_index() -> None:
    old, late = 0, RECENT_DAYS + 10
    popularity = of((old, 1), (old, 1), (old, 1), (late, 4), (old, 3), items=5)
    assert popularity.fallback((late + 1) * DAY).tolist() == [4, 1, 3, 2, 5]


def test_before_the_data_the_index_decides() -> None:
    assert COUNTED.fallback(0).tolist() == [1, 2, 3]
    assert COUNTED.fallback(-50 * DAY).tolist() == [1, 2, 3]


def test_long_after_the_data_its_last_month_still_counts() -> None:
    popularity = of((0, 1), (0, 1), (0, 1), (100, 2), (100, 3), (100, 3))
    at_the_end = popularity.fallback(101 * DAY).tolist()
    assert at_the_end == [3, 2, 1]
    assert popularity.fallback(10_000 * DAY).tolist() == at_the_end


def test_no_events_at_all_rank_by_index() -> None:
    none = np.zeros(0, np.int64)
    assert Popularity(none, none, none, 3).fallback(DAY).tolist() == [1, 2, 3]
    assert Popularity.of_events(none, none, 3).fallback(DAY).tolist() == [1, 2, 3]


@pytest.mark.parametrize(("items", "kept"), [(10, 64), (100_000, 20), (5_000_000, 2)])
def test_orders_of_other_days_take_a_bounded_room(items: int, kept: int) -> None:
    counted = Popularity(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), items)
    assert counted.ranked.cache_parameters()["maxsize"] == kept
