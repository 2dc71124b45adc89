"""From a query vector to the best items that exist and are not banned.

A score is `vectors[r] · query` for item index r + 1, whatever path found the item. Two ways lead there:

    exact  one matrix-vector product over the prefix of items that exist, the exceptions masked
    hnsw   approximate search over all items, over-fetched, what may not be returned masked;
           when too few are left, exact

`auto` picks by size. Every path ends in `Scope.permits` on the current values.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from pathlib import Path
from typing import Final

import hnswlib
import numpy as np

from shared.catalogue import Availability
from shared.encoder import Vectors
from shared.events import BoolArray, IntArray

log = logging.getLogger(__name__)

EXACT_ITEMS: Final = 30_000
"""Prefixes up to this size are searched exactly: 0.15 ms at width 64, less than HNSW with its over-fetch."""
EXACT_SHARE: Final = 0.1
"""Below this share of allowed items HNSW would have to fetch too many to leave enough."""
MAX_FETCH: Final = 2_000
OVER_FETCH: Final = 1.5


class Mode(StrEnum):
    """Which path `retrieve` takes."""

    AUTO = "auto"
    EXACT = "exact"
    HNSW = "hnsw"


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Items best first (ties by index), their scores, and the path that found them."""

    items: IntArray  # (K,) item indices
    scores: Vectors  # (K,)
    path: str


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be returned: items that exist at `as_of` by `availability`, but none in `banned`."""

    availability: Availability
    as_of: int  # epoch microseconds
    banned: IntArray  # item indices in any order: seen and excluded ones

    def permits(self, items: IntArray) -> BoolArray:
        """The final gate, which every path to an answer ends in; (E,) for item indices (E,)."""
        return self.availability.allowed(items, self.as_of) & ~np.isin(items, self.banned)


class Retriever:
    """Search over the item vectors of one model. Read-only after construction; safe to share between threads."""

    def __init__(self, vectors: Vectors, index: hnswlib.Index | None, mode: Mode = Mode.AUTO) -> None:
        """`vectors` (N, D): row r belongs to item index r + 1. `index` holds the same rows under labels r."""
        self.vectors, self.index, self.mode = vectors, index, mode

    def retrieve(self, query: Vectors, count: int, scope: Scope) -> Retrieval:
        """The `count` best items for `query` (D,) that `scope` permits.

        Fewer than `count` come back only when fewer are permitted.
        """
        n = scope.availability.prefix(scope.as_of)
        blocked, extra = scope.availability.exceptions(scope.as_of)
        allowed = n - len(blocked) + len(extra)
        path = "exact"
        if self.index is not None and self._worth_hnsw(allowed):
            share = max(allowed, 1) / len(self.vectors)
            found = self._hnsw(self.index, query, ceil((count + len(scope.banned)) / share * OVER_FETCH))
            found = found[scope.permits(found)]
            if len(found) >= count:
                return self.rank(query, found, count, "hnsw")
            path = "hnsw_exact"
        found = self._exact(query, count, n, np.concatenate((scope.banned, blocked)))
        found = np.concatenate((found, extra))
        return self.rank(query, found[scope.permits(found)], count, path)

    def rank(self, query: Vectors, items: IntArray, count: int, path: str = "gather") -> Retrieval:
        """Score `items` exactly and order them, ties by index; the best `count`."""
        items = np.sort(items)
        scores = self.vectors[items - 1] @ query  # (K, D) @ (D,) -> (K,)
        best = np.argsort(-scores, kind="stable")[:count]
        return Retrieval(items[best], scores[best], path)

    def _worth_hnsw(self, allowed: int) -> bool:
        if self.mode is not Mode.AUTO:
            return self.mode is Mode.HNSW
        return allowed > EXACT_ITEMS and allowed > EXACT_SHARE * len(self.vectors)

    def _exact(self, query: Vectors, count: int, n: int, banned: IntArray) -> IntArray:
        """The `count` best among item indices 1..n without `banned`."""
        scores = self.vectors[:n] @ query  # (n,)
        scores[banned[banned <= n] - 1] = -np.inf
        return top(scores, count) + 1

    def _hnsw(self, index: hnswlib.Index, query: Vectors, fetch: int) -> IntArray:
        """About the `fetch` best of all items; none when the index fails."""
        try:
            labels, _ = index.knn_query(query, k=min(fetch, MAX_FETCH, len(self.vectors)), num_threads=1)
        except RuntimeError as error:
            # hnswlib found fewer than it was asked for, and leaks its buffers each time it says so.
            log.warning("HNSW search failed, exact search until the next bundle: %s", error)
            self.index = None
            return np.zeros(0, np.int64)
        return np.asarray(labels[0], np.int64) + 1


def top(scores: Vectors, count: int) -> IntArray:
    """Positions of the `count` largest finite scores, ties to the lower position; in no order. (K,)

    top([3, 1, 2, 2], 2) -> {0, 2}
    """
    if count >= len(scores):
        return np.flatnonzero(scores > -np.inf)
    cut = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > cut)
    if cut == -np.inf:
        return above
    ties = np.flatnonzero(scores == cut)[: count - len(above)]
    return np.concatenate((above, ties))


def build_index(vectors: Vectors, *, m: int = 16, ef_construction: int = 200, seed: int = 0) -> hnswlib.Index:
    """An HNSW index over inner products; labels are rows of `vectors`.

    Rows are added in random order: in catalogue order, early items would crowd the upper layers.
    """
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=m, ef_construction=ef_construction, random_seed=seed + 100)
    order = np.random.default_rng(seed).permutation(len(vectors))
    index.add_items(vectors[order], order, num_threads=1)
    return index


def load_index(path: str, width: int, ef: int) -> hnswlib.Index:
    """Load an index and set `ef`, which loading resets and which is shared by all queries.

    Raises ValueError for an index of another width: hnswlib itself would read past the end of its vectors.
    """
    with Path(path).open("rb") as file:  # hnswlib's header: six sizes, of which the last two enclose a vector
        *_, after_vector, at_vector = struct.unpack("=6Q", file.read(48))
    if after_vector - at_vector != width * np.dtype(np.float32).itemsize:
        raise ValueError(f"{Path(path).name} was not built for vectors of width {width}")
    index = hnswlib.Index(space="ip", dim=width)
    index.load_index(path)
    index.set_ef(ef)
    index.set_num_threads(1)
    return index
