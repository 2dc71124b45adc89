"""Items like an item: by the vectors of a model, or by categories when it has none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

import numpy as np

from service.bundles import Serving
from service.errors import UnknownItem
from service.recommend import Recommended, Recommender, by_popularity, described, first
from service.telemetry import Trace
from shared.bundle import Model
from shared.categories import Categories
from shared.events import IntArray, ItemId, ItemIndex
from shared.retrieval import Retrieval, Scope
from shared.times import now

SPARE: Final = 32
"""More items than are wanted, in place of those that are withdrawn while the others are looked for."""


@dataclass(frozen=True, slots=True)
class Similar:
    """Items like `item_id`, best first."""

    item_id: ItemId
    model: str
    version: str
    as_of: int
    strategy: Literal["similar", "popular"]
    requested: int
    items: list[Recommended]


async def similar(
    recommender: Recommender, serving: Serving, model: Model, item_id: ItemId, n: int, as_of: int | None, trace: Trace
) -> Similar:
    """The n items most like `item_id` that exist at `as_of` (now without it). Raises UnknownItem.

    The item itself need not exist then: who looks at an item that is gone wants others all the more.
    """
    index = serving.index(item_id)
    if index is None:
        raise UnknownItem(f"No item {item_id!r} is in the catalogue.")
    as_of, has_vector = now() if as_of is None else as_of, index <= serving.known
    with trace.stage("retrieve"):
        search: Callable[[ItemIndex, int, Scope], Retrieval] = model.retriever.similar
        if not has_vector:
            await recommender.order_by_popularity(serving, as_of)
            search = partial(akin, by_popularity(serving, as_of), serving.categories)
        # Of the same moment: items may be added while a thread looks at these.
        scope = Scope(serving.availability, as_of, np.array([index], np.int64))
        best = await recommender.beside(serving, partial(search, index, n + SPARE, scope))
        # The final gate: the catalogue may have changed meanwhile.
        permitted = np.flatnonzero(replace(scope, availability=serving.availability).permits(best.items))[:n]
        best = Retrieval(best.items[permitted], best.scores[permitted], best.path)
    trace.paths[best.path] += 1
    strategy: Literal["similar", "popular"] = "similar" if has_vector else "popular"
    items = list(described(best, strategy, serving))
    return Similar(item_id, model.name, serving.bundle.version, scope.as_of, strategy, n, items)


def akin(order: IntArray, categories: Categories, index: ItemIndex, n: int, scope: Scope) -> Retrieval:
    """Items that share categories with one that has no vector: the more the better, then as in `order`."""
    shared = categories.sharing(index, len(scope.availability.withdrawn))[order]
    most = np.argsort(-shared, kind="stable")[: np.count_nonzero(shared)]
    return first(order[most], scope, n)
