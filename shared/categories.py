"""Which items carry which category, and what a caller may wish for beside that an item exists.

A category is text of the form "field:value", for instance "genre:Comedy". Membership is one sorted array of item
indices for each category, made once a bundle; a changed item leaves some of them and joins others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np

from shared.catalogue import Catalogue, Item
from shared.columns import Integers
from shared.events import BoolArray, IntArray, ItemIndex

_NONE: Final = np.zeros(0, np.int32)


def field_of(category: str) -> str:
    """field_of("genre:Comedy") -> "genre"."""
    return category.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Where:
    """What items must be like. Hashable, so that answers to it can be kept.

    any_of ("genre:Comedy", "genre:Drama", "country:fr")   (Comedy or Drama) and fr
    none_of ("genre:Horror", "country:us")                 neither of the two
    after, before                                          after <= available_from <= before
    """

    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    after: int | None = None  # epoch microseconds
    before: int | None = None

    def by_field(self) -> list[list[str]]:
        """`any_of` in groups of one field: of each group an item must have one."""
        groups: dict[str, list[str]] = {}
        for category in self.any_of:
            groups.setdefault(field_of(category), []).append(category)
        return list(groups.values())


@dataclass(frozen=True)
class Categories:
    """Item indices by category: the bundle's, with the live changes on top. Immutable."""

    members: Mapping[str, Integers]  # category -> sorted item indices; a category that lost its last item stays
    live: Mapping[ItemIndex, tuple[str, ...]]  # categories of the items that changed since the bundle
    catalogue: Catalogue

    @classmethod
    def of(cls, catalogue: Catalogue) -> Categories:
        """As the bundle has it, without live changes."""
        numbers: dict[str, int] = {}
        sets = [[numbers.setdefault(c, len(numbers)) for c in dict.fromkeys(s)] for s in catalogue.items.category_sets]
        sizes, of_sets = np.array([len(s) for s in sets], np.int64), np.array([c for s in sets for c in s], np.int64)
        which = catalogue.items.category_set
        counts = sizes[which]  # (N,)
        # Each item as often as it has categories.
        index = np.repeat(np.arange(1, len(which) + 1, dtype=np.int32), counts)
        first = (np.cumsum(sizes) - sizes)[which] - (np.cumsum(counts) - counts)
        category = of_sets[np.repeat(first, counts) + np.arange(len(index))]
        grouped = index[np.argsort(category, kind="stable")]
        members = np.split(grouped, np.cumsum(np.bincount(category, minlength=len(numbers))))
        return cls(dict(zip(numbers, members, strict=False)), {}, catalogue)

    def __getitem__(self, index: ItemIndex) -> tuple[str, ...]:
        """The categories of an item."""
        if index in self.live:
            return self.live[index]
        items = self.catalogue.items
        return items.category_sets[items.category_set[index - 1]] if index <= len(items) else ()

    @cached_property
    def fields(self) -> list[str]:
        """The fields that can be asked for, sorted."""
        return sorted({field_of(category) for category in self.members if ":" in category})

    def holding(self, items: Iterable[tuple[ItemIndex, Item]]) -> Categories:
        """A new object with these values for these item indices, which may lie beyond the bundle's: new items."""
        newest = {index: item.categories for index, item in items}
        gone, come = defaultdict(list), defaultdict(list)
        for index, categories in newest.items():
            before, after = set(self[index]), set(categories)
            for category in before - after:
                gone[category].append(index)
            for category in after - before:
                come[category].append(index)
        members = dict(self.members)
        for category in gone.keys() | come.keys():
            # By position: the library's set operations sort all members again, 100 ms for 100,000 of them.
            found, left, joined = members.get(category, _NONE), sorted(gone[category]), sorted(come[category])
            found = np.delete(found, np.searchsorted(found, left))
            members[category] = np.insert(found, np.searchsorted(found, joined), joined)
        return replace(self, members=members, live={**self.live, **newest})

    def select(self, where: Where, available_from: IntArray) -> BoolArray:
        """Whether each item is like `where` wants it; (rows,) like `available_from`, both by item index."""
        wanted = np.ones(len(available_from), bool)
        for group in where.by_field():
            wanted &= self._any(group, len(wanted))
        wanted &= ~self._any(where.none_of, len(wanted))
        if where.after is not None:
            wanted &= available_from >= where.after
        if where.before is not None:
            wanted &= available_from <= where.before
        return wanted

    def sharing(self, index: ItemIndex, rows: int) -> IntArray:
        """How many categories each item has in common with the item `index`; (rows,) by item index."""
        shared = np.zeros(rows, np.int64)
        for category in set(self[index]):
            shared[self.members[category]] += 1
        return shared

    def _any(self, categories: Iterable[str], rows: int) -> BoolArray:
        found = np.zeros(rows, bool)
        for category in categories:
            found[self.members.get(category, _NONE)] = True
        return found
