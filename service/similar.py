"""Items like an item: by the vectors of a model, or by categories when it has none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal

import numpy as np

from service.bundles import Serving
from service.errors import UnknownItem
from service.recommend import Recommended, Recommender, by_popularity, described, first
from service.telemetry import Trace
from shared.bundle import Model
from shared.events import ItemId, ItemIndex
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
    scope = Scope(serving.availability, now() if as_of is None else as_of, np.array([index], np.int64))
    with trace.stage("retrieve"):
        has_vector = index <= serving.known
        search = model.retriever.similar if has_vector else partial(akin, serving)
        best = await recommender.beside(serving, partial(search, index, n + SPARE, scope))
        # The final gate: the catalogue may have changed meanwhile.
        permitted = np.flatnonzero(replace(scope, availability=serving.availability).permits(best.items))[:n]
        best = Retrieval(best.items[permitted], best.scores[permitted], best.path)
    trace.paths[best.path] += 1
    strategy: Literal["similar", "popular"] = "similar" if has_vector else "popular"
    items = list(described(best, strategy, serving))
    return Similar(item_id, model.name, serving.bundle.version, scope.as_of, strategy, n, items)


def akin(serving: Serving, index: ItemIndex, n: int, scope: Scope) -> Retrieval:
    """Items that share categories with one that has no vector: the more the better, then by popularity."""
    order = by_popularity(serving, scope.as_of)
    shared = serving.categories.sharing(index, len(scope.availability.withdrawn))[order]
    most = np.argsort(-shared, kind="stable")[: np.count_nonzero(shared)]
    return first(order[most], scope, n)
