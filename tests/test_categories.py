"""Categories: what a filter selects, and how live changes move items in and out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.catalogue import Catalogue, Item
from shared.categories import Categories, Where
from shared.events import IntArray
from shared.times import BEGINNING

CATALOGUE = Catalogue.number(
    [
        Item("a", None, ("genre:Comedy", "country:fr"), 10),
        Item("b", None, ("genre:Drama", "country:us"), 20),
        Item("c", None, ("genre:Comedy", "genre:Drama", "country:us"), 30),
        Item("d", None, (), 40),
    ]
)
STARTS = np.array([BEGINNING, 10, 20, 30, 40])


def selected(where: Where, categories: Categories | None = None, starts: IntArray = STARTS) -> list[int]:
    wanted = (categories or Categories.of(CATALOGUE)).select(where, starts)
    assert wanted.shape == starts.shape
    return [index for index in range(1, len(starts)) if wanted[index]]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (Where(), [1, 2, 3, 4]),
        (Where(("genre:Comedy",)), [1, 3]),
        (Where(("genre:Comedy", "genre:Drama")), [1, 2, 3]),
        (Where(("genre:Comedy", "country:us")), [3]),
        (Where(("genre:Comedy", "country:us", "country:fr")), [1, 3]),
        (Where(("genre:Horror",)), []),
        (Where(("genre:Horror", "genre:Drama")), [2, 3]),
        (Where((), ("genre:Drama",)), [1, 4]),
        (Where((), ("genre:Drama", "country:fr")), [4]),
        (Where(("country:us",), ("genre:Comedy",)), [2]),
        (Where((), ("genre:Horror",)), [1, 2, 3, 4]),
        (Where(after=20), [2, 3, 4]),
        (Where(before=20), [1, 2]),
        (Where(after=20, before=30), [2, 3]),
        (Where(after=31, before=30), []),
        (Where(("genre:Comedy",), (), 11), [3]),
    ],
)
def test_or_within_a_field_and_across_fields(where: Where, wanted: list[int]) -> None:
    assert selected(where) == wanted


def test_changed_items_leave_and_join() -> None:
    before = Categories.of(CATALOGUE)
    changed = before.holding([(1, Item("a", None, ("genre:Horror",))), (3, Item("c", None, ("genre:Drama",)))])
    assert selected(Where(("genre:Comedy",)), changed) == []
    assert selected(Where(("genre:Drama",)), changed) == [2, 3]
    assert selected(Where(("genre:Horror",)), changed) == [1]
    assert changed[1] == ("genre:Horror",)
    again = changed.holding([(1, Item("a", None, ("genre:Comedy", "country:fr")))])
    assert selected(Where(("genre:Comedy",)), again) == [1]
    assert selected(Where(("genre:Horror",)), again) == []
    assert selected(Where(("genre:Comedy",)), before) == [1, 3]  # the old object is as it was


def test_new_items_have_categories_beyond_the_bundle() -> None:
    grown = Categories.of(CATALOGUE).holding([(6, Item("e", None, ("genre:Comedy", "mood:dark")))])
    starts = np.append(STARTS, [0, 50])
    assert selected(Where(("genre:Comedy",)), grown, starts) == [1, 3, 6]
    assert selected(Where(("mood:dark",)), grown, starts) == [6]
    assert grown[6] == ("genre:Comedy", "mood:dark")
    assert grown[5] == ()


def test_fields_stay_known_when_their_last_item_left() -> None:
    categories = Categories.of(CATALOGUE)
    assert categories.fields == ["country", "genre"]
    assert categories.holding([(1, Item("a")), (2, Item("b")), (3, Item("c"))]).fields == ["country", "genre"]
    odd = Catalogue.number([Item("a", None, ("no field", "genre:Sci-Fi: new"))])
    assert Categories.of(odd).fields == ["genre"]
    assert Categories.of(Catalogue.number([])).fields == []


def test_how_many_categories_are_shared() -> None:
    assert Categories.of(CATALOGUE).sharing(3, 5).tolist() == [0, 1, 2, 3, 0]


@given(st.lists(st.lists(st.sampled_from(["g:a", "g:b", "h:a", "h:b"]), max_size=5), max_size=8))
def test_members_are_those_that_say_so(named: list[list[str]]) -> None:
    """Also where an item names a category twice."""
    catalogue = Catalogue.number([Item(str(n), None, tuple(of_item)) for n, of_item in enumerate(named)])
    members = Categories.of(catalogue).members
    truth = {c: [n for n, item in enumerate(catalogue.items, 1) if c in item.categories] for of in named for c in of}
    assert {category: found.tolist() for category, found in members.items()} == truth


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(1, 6), st.sets(st.sampled_from(["g:a", "g:b", "h:a", "h:b"])).map(tuple)), max_size=6
        ),
        max_size=5,
    )
)
def test_members_are_sorted_and_those_that_say_so_whatever_changes(
    changes: list[list[tuple[int, tuple[str, ...]]]],
) -> None:
    catalogue = Catalogue.number([Item(str(n), None, ("g:a", "h:b")[: n % 3], n) for n in range(1, 5)])
    truth = {index: set(item.categories) for index, item in enumerate(catalogue.items, start=1)}
    categories = Categories.of(catalogue)
    for step in changes:
        categories = categories.holding([(index, Item(str(index), None, named)) for index, named in step])
        truth |= {index: set(named) for index, named in step}
        for category in {*categories.members, "g:a", "g:b", "h:a", "h:b"}:
            wanted = sorted(index for index, named in truth.items() if category in named)
            assert categories.members.get(category, np.zeros(0)).tolist() == wanted
