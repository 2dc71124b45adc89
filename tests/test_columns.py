"""Columns: nothing is lost by taking less memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.columns import TextWriter, narrow

INT32 = np.iinfo(np.int32)
AROUND = st.sampled_from([INT32.min - 1, INT32.min, -1, 0, INT32.max, INT32.max + 1])


@given(st.lists(AROUND | st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-5, 5), max_size=5))
def test_numbers_are_narrow_where_they_fit_and_always_the_same(numbers: list[int]) -> None:
    found = narrow(np.array(numbers, np.int64))
    assert found.tolist() == numbers
    fit = all(INT32.min <= number <= INT32.max for number in numbers)
    assert found.dtype == (np.int32 if fit else np.int64)


@given(st.lists(st.text(max_size=9), max_size=9))
def test_texts_are_the_same_one_by_one_in_part_and_all(texts: list[str]) -> None:
    writer = TextWriter()
    for text in texts:
        writer.add(text)
    found = writer.written()
    assert len(found) == len(texts)
    assert list(found) == texts == found[:]
    assert [found[row] for row in range(-len(texts), len(texts))] == 2 * texts
    assert found[1::2] == texts[1::2]
