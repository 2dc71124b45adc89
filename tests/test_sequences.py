"""`pack` and `pack_slices`: from histories to the rectangle that an encoder reads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.sequences import BUCKETS, PAD, bucket_of, mask_index, pack, pack_slices, time_buckets
from shared.times import SECOND, of_year

MASK = 99
some_histories = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=6)


def packed(histories: list[list[int]], max_length: int, **options: int) -> tuple[list[list[int]], list[int]]:
    items, lengths = pack(histories, max_length, **options)
    return items.tolist(), lengths.tolist()


def test_the_examples_of_the_docstring() -> None:
    assert packed([[7, 8, 9], [4]], 2) == ([[8, 9], [4, 0]], [2, 1])
    assert packed([[7, 8, 9], [4]], 3, mask=MASK) == ([[8, 9, MASK], [4, MASK, 0]], [3, 2])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 21])
def test_one_history_of_each_length_around_the_limit(length: int) -> None:
    history = list(range(1, length + 1))
    assert packed([history], 16) == ([history[-16:]], [min(length, 16)])
    assert packed([history], 16, mask=MASK) == ([[*history[-15:], MASK]], [min(length, 15) + 1])


def test_width_pads_beyond_the_longest_row() -> None:
    assert packed([[7, 8], [4]], 8, width=4) == ([[7, 8, 0, 0], [4, 0, 0, 0]], [2, 1])


def test_slices_may_overlap_skip_and_stand_in_any_order() -> None:
    flat = np.arange(1, 11)
    items, lengths = pack_slices(flat, np.array([6, 0, 1]), np.array([9, 2, 4]), 3)
    assert items.tolist() == [[7, 8, 9], [1, 2, PAD], [2, 3, 4]]
    assert lengths.tolist() == [3, 2, 3]


def test_a_history_without_items_is_an_error_but_for_the_mask() -> None:
    with pytest.raises(ValueError, match="without a known item"):
        pack([[1], []], 4)
    assert packed([[1], []], 4, mask=MASK) == ([[1, MASK], [MASK, 0]], [2, 1])


def test_a_length_that_leaves_no_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="no room"):
        pack([[1]], 1, mask=MASK)
    with pytest.raises(ValueError, match="no room"):
        pack([[1]], 0)


def test_no_histories_pack_to_no_rows() -> None:
    items, lengths = pack([], 4)
    assert (len(items), len(lengths)) == (0, 0)


@given(some_histories, st.integers(2, 10), st.booleans())
def test_rows_are_the_newest_items_in_order_right_padded(histories: list[list[int]], limit: int, masked: bool) -> None:
    items, lengths = pack(histories, limit, mask=MASK if masked else None)
    room = limit - masked
    for row, length, history in zip(items.tolist(), lengths.tolist(), histories, strict=True):
        assert row[:length] == history[-room:] + [MASK] * masked
        assert set(row[length:]) <= {PAD}
    assert items.shape == (len(histories), lengths.max())


@given(some_histories, st.integers(2, 10), st.integers(0, 5), st.booleans())
def test_slices_of_one_array_pack_alike(histories: list[list[int]], limit: int, wider: int, masked: bool) -> None:
    flat = np.concatenate([np.array(h, np.int64) for h in histories])
    stops = np.cumsum([len(h) for h in histories])
    starts = stops - [len(h) for h in histories]
    mask = MASK if masked else None
    for width in (None, limit + wider):
        items, lengths = pack_slices(flat, starts, stops, limit, mask=mask, width=width)
        wanted, wanted_lengths = pack(histories, limit, mask=mask, width=width)
        assert items.tolist() == wanted.tolist()
        assert lengths.tolist() == wanted_lengths.tolist()
        assert items.shape[1] == (lengths.max() if width is None else width)


def test_mask_stands_behind_the_last_item() -> None:
    assert mask_index(30) == 31


@given(st.integers(1, 400), st.integers(2, 200))
def test_a_bucket_holds_the_length_up_to_the_limit(length: int, limit: int) -> None:
    found = bucket_of(length, limit)
    assert min(length, limit) <= found <= limit
    assert found in (*BUCKETS, limit)
    assert not any(min(length, limit) <= b < found for b in BUCKETS)  # the smallest one


# --- times ------------------------------------------------------------------------------------------------

APART = {0: 0, 1: 0, 2: 2, 60: 13, 3600: 27, 86_400: 37, 31_536_000: 57}
"""Seconds -> floor(ln(seconds) / 0.301), by hand."""


def ages(times: list[int], clock: str, largest: int = 99, *, masked: bool = False) -> list[list[int]]:
    found = time_buckets(np.array([times], np.int64), clock, largest, masked=masked)  # type: ignore[arg-type]
    assert found.dtype == np.int32
    rows: list[list[int]] = found[0].tolist()
    return rows


@pytest.mark.parametrize(("seconds", "bucket"), APART.items())
def test_the_bucket_of_a_time_apart(seconds: int, bucket: int) -> None:
    now = of_year(2026)
    assert ages([now - seconds * SECOND, now], "query") == [[bucket]]
    assert ages([now, now - seconds * SECOND], "query") == [[bucket]]  # order is by arrival: clocks may run back


def test_moments_are_those_of_the_newest_event_or_of_the_question() -> None:
    now = of_year(2026)
    times = [now - 3660 * SECOND, now - 60 * SECOND, now]  # of two events and the question
    assert ages(times, "query") == [[27, 0], [27, 13]]
    assert ages(times, "events") == [[0, 27], [27, 0]]
    assert ages(times, "query", masked=True) == [[0, 27, 27], [27, 0, 13], [27, 13, 0]]


def test_what_training_never_saw_counts_as_the_largest() -> None:
    assert ages([of_year(1990), of_year(2026)], "query", 40) == [[40]]


@given(st.integers(0, 2**40), st.integers(0, 2**20))
def test_buckets_do_not_depend_on_how_late_in_time_it_is(seconds: int, apart: int) -> None:
    """A cast of epoch times before taking differences would lose seconds."""
    late = [seconds * SECOND, (seconds + apart) * SECOND]
    assert ages(late, "query") == ages([0, apart * SECOND], "query")


@given(some_histories, st.integers(2, 15), st.sampled_from([None, MASK]), st.integers(0, 5))
def test_one_history_is_packed_as_it_would_be_among_others(
    histories: list[list[int]], max_length: int, mask: int | None, room: int
) -> None:
    width = max_length + room
    items, lengths = pack(histories, max_length, mask=mask, width=width)
    for history, row, length in zip(histories, items, lengths, strict=True):
        alone, its = pack([history], max_length, mask=mask, width=width)
        assert alone.tolist() == [row.tolist()]
        assert its.tolist() == [length]
