"""Numbering, and whether an item exists at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import catalogue as module
from shared.catalogue import Availability, Catalogue, CatalogueError, Item, ItemChange, Items, NewItems
from shared.events import item_key, item_keys
from shared.times import BEGINNING, END


def ids(catalogue: Catalogue) -> list[str]:
    return [item.item_id for item in catalogue.items]


def change(item_id: str, start: int | None = None, until: int | None = None, *, withdrawn: bool = False) -> ItemChange:
    return ItemChange(item_id, None, None, start, until, withdrawn, revision=1)


def test_items_are_numbered_by_their_start_then_by_id() -> None:
    catalogue = Catalogue.number(
        [Item("b", available_from=5), Item("10", available_from=5), Item("z"), Item("9", available_from=5)]
    )
    assert ids(catalogue) == ["z", "10", "9", "b"]
    assert catalogue.index_by_id == {"z": 1, "10": 2, "9": 3, "b": 4}
    assert catalogue[4].item_id == "b"


SOME = st.builds(
    Item,
    item_id=st.text(min_size=1, max_size=5),
    title=st.none() | st.text(st.characters(), max_size=5),  # lone surrogates too: JSON may hold them
    categories=st.lists(st.sampled_from(["g:a", "g:b", "h:ü", "odd"]), max_size=3).map(tuple),
    available_from=st.sampled_from([BEGINNING, -1, 0, 7, END]),
    available_until=st.sampled_from([BEGINNING, 7, END]),
    withdrawn=st.booleans(),
)


@given(st.lists(SOME, max_size=6), st.slices(6))
def test_items_come_back_out_of_their_columns(given_items: list[Item], part: slice) -> None:
    items = Items(given_items)
    assert list(items) == given_items
    assert items == given_items
    assert items != [*given_items, Item("more")]
    assert items[part] == given_items[part]
    assert [items[-n] for n in range(1, len(items) + 1)] == given_items[::-1]
    with pytest.raises(IndexError):
        items[len(items)]


@given(st.lists(SOME, max_size=6, unique_by=lambda item: item.item_id), st.text(max_size=5))
def test_ids_are_found_and_no_other(given_items: list[Item], other: str) -> None:
    catalogue = Catalogue.number(given_items)
    assert dict(catalogue.index_by_id) == {item.item_id: n for n, item in enumerate(catalogue.items, start=1)}
    assert (other in catalogue.index_by_id) == (other in {item.item_id for item in given_items})
    assert [catalogue.items.ids[row] for row in catalogue.rows_by_id] == sorted(i.item_id for i in given_items)


def test_an_id_whose_key_is_another_ones_is_not_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue.number([Item("a"), Item("b")])
    monkeypatch.setattr(module, "item_key", lambda _: item_key("a"))
    assert catalogue.index_by_id["a"] == 1
    assert "c" not in catalogue.index_by_id


def test_an_id_given_twice_is_refused() -> None:
    with pytest.raises(CatalogueError, match="twice"):
        Catalogue.number([Item("a"), Item("b"), Item("a", available_from=7)])


def test_stored_items_out_of_order_are_refused() -> None:
    with pytest.raises(CatalogueError, match="order"):
        Catalogue.in_order([Item("a", available_from=7), Item("b", available_from=6)])


def test_two_ids_with_one_key_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "item_keys", lambda found: np.zeros(len(found), np.uint64))
    with pytest.raises(CatalogueError, match="same 64-bit key"):
        Catalogue.number([Item("a"), Item("b")])


@given(st.sets(st.text("abc123", min_size=1, max_size=6), max_size=20))
def test_ids_and_keys_survive_the_round_trip(names: set[str]) -> None:
    catalogue = Catalogue.number([Item(n) for n in names])
    assert catalogue.indices_of_keys(item_keys(ids(catalogue))).tolist() == list(range(1, len(names) + 1))


def test_unknown_keys_are_0() -> None:
    catalogue = Catalogue.number([Item("a"), Item("b")])
    assert catalogue.indices_of_keys(item_keys(["nobody", "b", "unheard", "a"])).tolist() == [0, 2, 0, 1]
    assert Catalogue.number([]).indices_of_keys(item_keys(["a"])).tolist() == [0]


TIMES = st.integers(0, 6)
some_items = st.lists(
    st.tuples(st.one_of(st.just(BEGINNING), TIMES), st.one_of(st.just(END), TIMES), st.booleans()),
    min_size=1,
    max_size=12,
)
some_changes = st.lists(
    st.tuples(st.integers(0, 13), st.one_of(st.none(), TIMES), st.one_of(st.none(), TIMES), st.booleans()), max_size=8
)


def exists(item: Item, last: ItemChange | None, as_of: int) -> bool:
    """The rule in plain Python: a change counts, a field it leaves open keeps the item's own value."""
    if last is None:
        return item.available_from <= as_of < item.available_until and not item.withdrawn
    start = item.available_from if last.available_from is None else last.available_from
    until = item.available_until if last.available_until is None else last.available_until
    return start <= as_of < until and not last.withdrawn


@given(some_items, some_changes, st.integers(-1, 7))
def test_prefix_exceptions_and_allowed_agree_with_the_rule(
    items: list[tuple[int, int, bool]], changes: list[tuple[int, int | None, int | None, bool]], as_of: int
) -> None:
    catalogue = Catalogue.number([Item(str(n), None, (), *bounds) for n, bounds in enumerate(items)])
    changed = [change(str(n), start, until, withdrawn=gone) for n, start, until, gone in changes]
    last = {c.item_id: c for c in changed}
    wanted = [i for i, item in enumerate(catalogue.items, 1) if exists(item, last.get(item.item_id), as_of)]

    rule = Availability.of(catalogue).changed(catalogue, changed)
    every = np.arange(1, len(catalogue) + 1)
    assert every[rule.allowed(every, as_of)].tolist() == wanted
    blocked, extra = rule.exceptions(as_of)
    inside = set(range(1, rule.prefix(as_of) + 1))
    assert set(blocked.tolist()) <= inside
    assert not set(extra.tolist()) & inside
    assert sorted((inside - set(blocked.tolist())) | set(extra.tolist())) == wanted


def test_pad_never_exists() -> None:
    catalogue = Catalogue.number([Item("a")])
    for rule in (Availability.of(catalogue), Availability.open(1)):
        assert rule.allowed(np.array([0, 1]), 10).tolist() == [False, True]


def test_an_interval_holds_its_start_and_not_its_end() -> None:
    rule = Availability.of(Catalogue.number([Item("a", available_from=3, available_until=5)]))
    assert [bool(rule.allowed(np.array([1]), t)[0]) for t in (2, 3, 4, 5)] == [False, True, True, False]


def test_open_means_every_item_at_all_times() -> None:
    rule = Availability.open(3)
    for as_of in (BEGINNING, 0, END - 1):
        assert rule.prefix(as_of) == 3
        assert rule.allowed(np.array([1, 2, 3]), as_of).all()


def test_changes_leave_the_object_they_come_from_alone() -> None:
    catalogue = Catalogue.number([Item("a"), Item("b")])
    before = Availability.of(catalogue)
    after = before.changed(catalogue, [change("a", withdrawn=True)])
    assert before.allowed(np.array([1]), 0).all()
    assert not after.allowed(np.array([1]), 0).any()


def test_taking_a_withdrawal_back_restores_the_item() -> None:
    catalogue = Catalogue.number([Item("a", withdrawn=True, available_from=4)])
    rule = Availability.of(catalogue).changed(catalogue, [change("a")])
    assert [bool(rule.allowed(np.array([1]), t)[0]) for t in (3, 4)] == [False, True]


def test_new_items_are_numbered_behind_mask_and_keep_their_numbers() -> None:
    new = NewItems(3).with_ids(["x", "y", "x"])
    assert (len(new), dict(new.index_by_id)) == (2, {"x": 5, "y": 6})
    more = new.with_ids(["y", "z"])
    assert dict(more.index_by_id) == {"x": 5, "y": 6, "z": 7}
    assert [more[index] for index in (5, 6, 7)] == ["x", "y", "z"]
    assert sorted(more.indices_of_keys(item_keys(["z", "a", "x"])).tolist()) == [5, 7]
    assert len(NewItems(3).indices_of_keys(item_keys(["x"]))) == 0


def test_rows_of_new_items_follow_the_rule_and_mask_never_exists() -> None:
    catalogue = Catalogue.number([Item("a", available_from=10), Item("b", available_from=20)])
    rule = Availability.of(catalogue).holding([(5, Item("y", None, (), 15, 30)), (1, Item("a", None, (), 12))])
    every = np.arange(6)  # PAD, a, b, MASK, nothing yet, y
    assert rule.allowed(every, 15).tolist() == [False, True, False, False, False, True]
    assert rule.allowed(every, 30).tolist() == [False, True, True, False, False, False]
    assert rule.irregular.tolist() == [1]  # only items with vectors: retrieval adds these to what it finds
