"""Items: numbering inside a bundle, and whether an item exists at a time.

Items are numbered 1..N by (available_from, item id), so "the items that exist at t" is almost always
a prefix of the numbering: one binary search, and exact search runs over a contiguous slice. The
numbering is an accelerator, never the authority. `Availability.allowed` is: it knows closed
intervals, withdrawn items, and every change made since the bundle was written.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import eq
from typing import overload

import numpy as np
from numpy.typing import NDArray

from shared.columns import Texts, TextWriter, narrow
from shared.events import BoolArray, IntArray, ItemId, ItemIndex, KeyArray, item_key, item_keys
from shared.times import BEGINNING, END


class CatalogueError(ValueError):
    """Items that cannot make a catalogue: the same id twice, or two ids with one key."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is known of one item. It exists in `[available_from, available_until)` and not while withdrawn."""

    item_id: ItemId
    title: str | None = None
    categories: tuple[str, ...] = ()  # "field:value", for instance "genre:Comedy"
    available_from: int = BEGINNING  # epoch microseconds, inclusive
    available_until: int = END  # epoch microseconds, exclusive
    withdrawn: bool = False


@dataclass(frozen=True, slots=True)
class ItemChange:
    """A row of the live catalogue. None in a field leaves the bundle's value in force."""

    item_id: ItemId
    title: str | None
    categories: tuple[str, ...] | None
    available_from: int | None
    available_until: int | None
    withdrawn: bool
    revision: int
    loaded: bool = False  # from a file

    def gives_way(self, *, published: bool) -> bool:
        """Whether what a bundle says of the item counts instead: it is newer than a file, and derived from more."""
        return self.loaded and published

    def on(self, item: Item) -> Item:
        """`item` with the fields that this change sets."""
        return Item(
            item_id=item.item_id,
            title=item.title if self.title is None else self.title,
            categories=item.categories if self.categories is None else self.categories,
            available_from=item.available_from if self.available_from is None else self.available_from,
            available_until=item.available_until if self.available_until is None else self.available_until,
            withdrawn=self.withdrawn,
        )


class Items(Sequence[Item]):
    """Items in columns, each put together when it is asked for. Immutable.

    A million take 52 MB; as objects, which they were once, they took 700.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        ids, titles, titled = TextWriter(), TextWriter(), bytearray()
        sets: dict[tuple[str, ...], int] = {}
        names: dict[str, str] = {}
        chosen, starts, ends, withdrawn = array("i"), array("q", [END]), array("q", [BEGINNING]), bytearray([False])
        for item in items:
            ids.add(item.item_id)
            titles.add(item.title or "")
            titled.append(item.title is not None)
            if item.categories not in sets:
                sets[tuple(names.setdefault(name, name) for name in item.categories)] = len(sets)
            chosen.append(sets[item.categories])
            starts.append(item.available_from)
            ends.append(item.available_until)
            withdrawn.append(item.withdrawn)
        self.ids = ids.written()
        self.titles = titles.written()  # "" where there is none
        self.titled: BoolArray = np.array(titled, bool)  # (N,) whether there is one
        self.category_sets = tuple(sets)  # each that an item has, once
        self.category_set = np.array(chosen, np.int32)  # (N,) which of them
        # By item index, (N + 1,): of PAD, which never exists, and of the items.
        self.starts: IntArray = np.array(starts, np.int64)
        self.ends: IntArray = np.array(ends, np.int64)
        self.withdrawn: BoolArray = np.array(withdrawn, bool)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, row: int) -> Item: ...
    @overload
    def __getitem__(self, row: slice) -> list[Item]: ...
    def __getitem__(self, row: int | slice) -> Item | list[Item]:
        if isinstance(row, slice):
            return [self[r] for r in range(len(self))[row]]
        return Item(
            self.ids[row],
            self.titles[row] if self.titled[row] else None,
            self.category_sets[self.category_set[row]],
            int(self.starts[1:][row]),
            int(self.ends[1:][row]),
            bool(self.withdrawn[1:][row]),
        )

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    @property
    def available_from(self) -> IntArray:
        """(N,) epoch microseconds."""
        return self.starts[1:]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]


class Numbering(Mapping[ItemId, ItemIndex]):
    """The item index of each id, found by the id's key. Immutable. Raises CatalogueError for two ids of one key."""

    def __init__(self, ids: Texts) -> None:
        keys = item_keys(ids)
        order = np.argsort(keys)
        self._ids = ids
        self._known = keys[order]  # (N,) sorted
        self._rows = narrow(order)  # (N,)
        twice = np.flatnonzero(self._known[1:] == self._known[:-1])
        if len(twice) and any(ids[order[r]] == ids[order[r + 1]] for r in twice.tolist()):
            raise CatalogueError("the same item id stands twice in the catalogue")
        if len(twice):
            raise CatalogueError("two item ids of this catalogue have the same 64-bit key; rename one of them")

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[ItemId]:
        return iter(self._ids)

    def __getitem__(self, item_id: ItemId) -> ItemIndex:
        key = np.uint64(item_key(item_id))
        at = int(self._known.searchsorted(key))
        if at == len(self._known) or self._known[at] != key or self._ids[row := int(self._rows[at])] != item_id:
            raise KeyError(item_id)
        return row + 1

    def of_ids(self, item_ids: Sequence[ItemId]) -> list[ItemIndex]:
        """Item index of each id, 0 where there is no such item: for many at once."""
        found = zip(self.of_keys(item_keys(item_ids)).tolist(), item_ids, strict=True)
        return [index if index and self._ids[index - 1] == item_id else 0 for index, item_id in found]

    def is_within(self, other: Numbering) -> bool:
        """Whether the other one numbers all of these items too, by their keys."""
        return bool(other.of_keys(self._known).all())

    def of_keys(self, keys: KeyArray) -> IntArray:
        """Item index of each key, (E,); 0 where there is no such item."""
        if not len(self._known):
            return np.zeros(len(keys), np.int64)
        at = np.minimum(np.searchsorted(self._known, keys), len(self._known) - 1)
        return np.where(self._known[at] == keys, self._rows[at].astype(np.int64) + 1, 0)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The items of one bundle in index order: position r holds item index r + 1.

    item            b (1995)   c (1995)   a (2001)
    index           1          2          3
    prefix at 1999  [1, 2]
    """

    items: Items
    index_by_id: Numbering = field(repr=False)

    @classmethod
    def number(cls, items: Iterable[Item]) -> Catalogue:
        """Number items by (available_from, item id). Raises CatalogueError for an id given twice."""
        return cls.in_order(sorted(items, key=lambda i: (i.available_from, i.item_id)))

    @classmethod
    def in_order(cls, items: Iterable[Item]) -> Catalogue:
        """A catalogue of items that are already in index order, as a bundle stores them."""
        columns = Items(items)
        catalogue = cls(columns, Numbering(columns.ids))
        if np.any(columns.available_from[1:] < columns.available_from[:-1]):
            raise CatalogueError("items are not in the order of available_from")
        return catalogue

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: ItemIndex) -> Item:
        return self.items[index - 1]

    @property
    def available_from(self) -> IntArray:
        """(N,) epoch microseconds, non-decreasing."""
        return self.items.available_from

    def indices_of_keys(self, keys: KeyArray) -> IntArray:
        """Item index of each key, (E,); 0 where this bundle does not know the item."""
        return self.index_by_id.of_keys(keys)

    @cached_property
    def rows_by_id(self) -> NDArray[np.int32]:
        """(N,) rows in the order of their ids: for pages of a listing."""
        return np.array(sorted(range(len(self)), key=self.items.ids.__getitem__), np.int32)


@dataclass(frozen=True)
class NewItems:
    """Items added since the bundle was written, numbered N + 2, N + 3, ... as they came. No model has their vectors.

    N + 1 is left out: it is MASK. Numbers are never given anew, so they hold as long as the bundle is live.
    """

    known: int  # N
    ids: tuple[ItemId, ...] = ()
    keys: KeyArray = field(default_factory=lambda: item_keys([]))  # (M,)
    index_by_id: Mapping[ItemId, ItemIndex] = field(default_factory=dict)

    def with_ids(self, item_ids: Iterable[ItemId]) -> NewItems:
        """An object that also numbers those of `item_ids` that have no number yet."""
        fresh = [i for i in dict.fromkeys(item_ids) if i not in self.index_by_id]
        if not fresh:
            return self
        first = self.known + 2 + len(self.ids)
        numbers = {item_id: number for number, item_id in enumerate(fresh, start=first)}
        keys = np.concatenate((self.keys, item_keys(fresh)))
        return NewItems(self.known, (*self.ids, *fresh), keys, {**self.index_by_id, **numbers})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: ItemIndex) -> ItemId:
        return self.ids[index - self.known - 2]

    def indices_of_keys(self, keys: KeyArray) -> IntArray:
        """Item indices of those `keys` that are new items' keys, in no order."""
        return np.flatnonzero(np.isin(self.keys, keys)) + self.known + 2


@dataclass(frozen=True)
class Availability:
    """Which items exist at a time: the bundle's intervals with the live changes on top. Immutable.

    Arrays are indexed by item index, 0..N; row 0 (PAD) never exists. With new items there are rows up to
    N + 1 + M, of which N + 1 (MASK) never exists.
    """

    numbering: IntArray  # (N,) available_from that the numbering was made with
    available_from: IntArray  # (rows,)
    available_until: IntArray  # (rows,)
    withdrawn: BoolArray  # (rows,)
    irregular: IntArray  # items for which "inside the prefix" is not the whole answer

    @classmethod
    def of(cls, catalogue: Catalogue) -> Availability:
        """As the bundle has it, without live changes."""
        items = catalogue.items
        return cls._with(items.available_from, items.starts, items.ends, items.withdrawn)

    @classmethod
    def open(cls, item_count: int) -> Availability:
        """Every item exists at all times: for figures that are compared with papers, which know no such rule."""
        starts, until = np.full(item_count + 1, BEGINNING, np.int64), np.full(item_count + 1, END, np.int64)
        starts[0] = END
        return cls._with(starts[1:], starts, until, np.zeros(item_count + 1, bool))

    @classmethod
    def starting(cls, catalogue: Catalogue, starts: IntArray) -> Availability:
        """As the bundle has it, but for other `available_from` (N,), in index order."""
        of = cls.of(catalogue)
        return cls._with(of.numbering, np.concatenate(([END], starts)), of.available_until, of.withdrawn)

    @classmethod
    def _with(cls, numbering: IntArray, starts: IntArray, until: IntArray, withdrawn: BoolArray) -> Availability:
        inside = slice(1, len(numbering) + 1)
        regular = (starts[inside] == numbering) & (until[inside] == END) & ~withdrawn[inside]
        return cls(numbering, starts, until, withdrawn, np.flatnonzero(~regular) + 1)

    def changed(self, catalogue: Catalogue, changes: Iterable[ItemChange]) -> Availability:
        """A new object with `changes` applied on the bundle's own values; ids it does not know are passed over."""
        found = ((catalogue.index_by_id.get(change.item_id), change) for change in changes)
        return self.holding((index, change.on(catalogue[index])) for index, change in found if index is not None)

    def holding(self, items: Iterable[tuple[ItemIndex, Item]]) -> Availability:
        """A new object with these values for these item indices, which may lie beyond the bundle's: new items."""
        found = list(items)
        missing = max([0, *(index + 1 - len(self.withdrawn) for index, _ in found)])
        never = np.full(missing, END, np.int64)
        starts = np.concatenate((self.available_from, never))
        until = np.concatenate((self.available_until, never))
        withdrawn = np.concatenate((self.withdrawn, np.ones(missing, bool)))
        for index, item in found:
            starts[index], until[index], withdrawn[index] = item.available_from, item.available_until, item.withdrawn
        return self._with(self.numbering, starts, until, withdrawn)

    def prefix(self, as_of: int) -> int:
        """n(t): items 1..n were numbered as existing at `as_of`."""
        return int(np.searchsorted(self.numbering, as_of, side="right"))

    def allowed(self, indices: IntArray, as_of: int) -> BoolArray:
        """The rule itself: whether each item exists at `as_of`, (E,)."""
        starts, until = self.available_from[indices], self.available_until[indices]
        return (starts <= as_of) & (as_of < until) & ~self.withdrawn[indices]

    def exceptions(self, as_of: int) -> tuple[IntArray, IntArray]:
        """Where the prefix at `as_of` errs: items inside it that do not exist, items beyond it that do."""
        irregular = self.irregular
        if not len(irregular):
            return irregular, irregular
        exists, inside = self.allowed(irregular, as_of), irregular <= self.prefix(as_of)
        return irregular[inside & ~exists], irregular[~inside & exists]
