"""From a query vector to the best items that exist and are not banned.

A score is `vectors[r] · query` for item index r + 1, whatever path found the item. Three ways lead there:

    exact  one matrix-vector product over the prefix of items that exist, the exceptions masked
    gather the same over the items that a filter leaves, when those are few
    hnsw   approximate search over all items, over-fetched, what may not be returned masked;
           when too few are left, exact

`auto` picks by size. Every path ends in `Scope.permits` on the current values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Final, NamedTuple

import hnswlib
import numpy as np

from shared.catalogue import Availability
from shared.encoder import Vectors
from shared.events import BoolArray, IntArray, ItemIndex
from shared.index_file import check_index

log = logging.getLogger(__name__)

EXACT_ITEMS: Final = 100_000
"""So many allowed items are searched exactly: 1.1 ms at width 64, as long as HNSW takes for a recall of .98."""
EXACT_SHARE: Final = 0.2
"""Below this share of allowed items HNSW would have to fetch too many to leave enough."""
GATHER_SHARE: Final = 0.2
"""Up to this share of the prefix, gathering the vectors that a filter leaves costs less than multiplying all."""
MAX_FETCH: Final = 2_000
OVER_FETCH: Final = 2.5
"""HNSW is asked for so many times what is needed: its best hundred are better the more it looks for."""
TOGETHER: Final = 3
"""From so many queries on, one product of matrices takes less time than a product for each."""
SCORES: Final = 1 << 20
"""Products that are made at a time: 4 MB."""
GATHERED: Final = 2_048
"""Vectors that are gathered at a time: at width 64 half a megabyte, which stays in the processor's cache."""
ROWS: Final = 16
"""Items are ranked by products of so many rows, or twice as many and so on. BLAS takes rows in fours or eights
and rounds what is left over in another way, so that of two items with the same vector the second could come first."""
RANKED: Final = 2
"""Up to so many times what is asked for, items are ranked all: choosing among them first would cost more."""
_SORTED: Final = 1_000  # items: up to here sorting all costs less than finding the best first


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


class Candidates(NamedTuple):
    """Item indices in no order, and the path that found them."""

    items: IntArray  # (C,)
    path: str


@dataclass(frozen=True, slots=True)
class Scope:
    """What may be returned: items that exist at `as_of` by `availability` and are `wanted`, but none in `banned`."""

    availability: Availability
    as_of: int  # epoch microseconds
    banned: IntArray  # item indices, seen and excluded ones; given in any order, kept ascending
    wanted: BoolArray | None = None  # (rows,) by item index: what the caller's filters leave; None without filters

    def __post_init__(self) -> None:
        object.__setattr__(self, "banned", np.sort(self.banned))

    def permits(self, items: IntArray) -> BoolArray:
        """The final gate, which every path to an answer ends in; (E,) for item indices (E,)."""
        permitted = self.availability.allowed(items, self.as_of) & ~self._bans(items)
        return permitted if self.wanted is None else permitted & self.wanted[items]

    def _bans(self, items: IntArray) -> BoolArray:
        """`np.isin(items, banned)` in a tenth of its time: (E,)."""
        if not len(self.banned):
            return np.zeros(len(items), bool)
        return _sought(self.banned, items)[1]


@dataclass(frozen=True, slots=True)
class Span:
    """How far a scope reaches into the numbering: a prefix, and where the prefix errs."""

    n: int  # items 1..n were numbered as existing
    blocked: IntArray  # of those, the ones that do not exist
    extra: IntArray  # items with vectors beyond n that do
    allowed: int  # how many exist and are wanted; banned ones count

    @classmethod
    def of(cls, scope: Scope) -> Span:
        """The span of `scope`."""
        n = scope.availability.prefix(scope.as_of)
        blocked, extra = scope.availability.exceptions(scope.as_of)
        if scope.wanted is None:
            return cls(n, blocked, extra, n - len(blocked) + len(extra))
        inside, missing, beyond = scope.wanted[1 : n + 1], scope.wanted[blocked], scope.wanted[extra]
        counts = [int(np.count_nonzero(part)) for part in (inside, missing, beyond)]
        return cls(n, blocked, extra, counts[0] - counts[1] + counts[2])

    def is_gathered(self, scope: Scope) -> bool:
        """Whether exact search looks at the few wanted items one by one."""
        return scope.wanted is not None and self.allowed <= GATHER_SHARE * self.n


class Retriever:
    """Search over the item vectors of one model. Read-only after construction; safe to share between threads."""

    def __init__(self, vectors: Vectors, index: hnswlib.Index | None, mode: Mode = Mode.AUTO) -> None:
        """`vectors` (N, D): row r belongs to item index r + 1. `index` holds the same rows under labels r."""
        self.vectors, self.index, self.mode = vectors, index, mode
        self.failed = False  # the index, in a search; it was left

    def retrieve(self, query: Vectors, count: int, scope: Scope) -> Retrieval:
        """The `count` best items for `query` (D,) that `scope` permits.

        Fewer than `count` come back only when fewer are permitted.
        """
        found = self.candidates(query, count, scope)
        return self.rank(query, found.items, count, found.path)

    def candidates(self, query: Vectors, count: int, scope: Scope) -> Candidates:
        """The items that `retrieve` ranks: the `count` best in no order, and maybe up to as many others."""
        return self._candidates(query, count, scope, Span.of(scope))

    def candidates_of(self, queries: Vectors, counts: Sequence[int], scopes: Sequence[Scope]) -> list[Candidates]:
        """`candidates` for each of B queries (B, D), in less time: what several multiply is read once."""
        if len(queries) < TOGETHER:
            return [self.candidates(*question) for question in zip(queries, counts, scopes, strict=True)]
        spans = [Span.of(scope) for scope in scopes]
        multiplied = [
            b
            for b, (scope, span) in enumerate(zip(scopes, spans, strict=True))
            if not self._approximates(span) and not span.is_gathered(scope)
        ]
        n, scores = max((spans[b].n for b in multiplied), default=0), dict[int, Vectors]()
        if len(multiplied) >= TOGETHER and n * len(multiplied) <= SCORES:
            products = self.vectors[:n] @ queries[multiplied].T  # (n, D) @ (D, b) -> (n, b)
            scores = dict(zip(multiplied, np.ascontiguousarray(products.T), strict=True))
        asked = zip(queries, counts, scopes, spans, strict=True)
        return [self._candidates(*question, scores.get(b)) for b, question in enumerate(asked)]

    def _candidates(
        self, query: Vectors, count: int, scope: Scope, span: Span, scores: Vectors | None = None
    ) -> Candidates:
        short = None
        if self.index is not None and self._approximates(span):
            share = max(span.allowed, 1) / len(self.vectors)
            found = self._hnsw(self.index, query, ceil((count + len(scope.banned)) / share * OVER_FETCH))
            found = found[scope.permits(found)]
            if len(found) >= count:
                return self._narrowed(query, found, count, "hnsw")
            short = "hnsw_exact"
        found, path = self._exact(query, count, scope, span, scores=scores)
        return self._narrowed(query, found, count, short or path)

    def _narrowed(self, query: Vectors, items: IntArray, count: int, path: str) -> Candidates:
        """`items`, but no more than the ranking of `count` candidates should have to look at."""
        return Candidates(items if len(items) <= RANKED * count else self.rank(query, items, count).items, path)

    def similar(self, item: ItemIndex, count: int, scope: Scope) -> Retrieval:
        """The `count` items that `scope` permits whose vectors point most nearly where that of `item` does.

        Scores are cosines: by inner product, the items with the longest vectors (as a rule popular ones) would be
        similar to everything. Always exact, since the index knows inner products alone.
        """
        query = self.vectors[item - 1] * self.scales[item - 1]  # (D,)
        found, path = self._exact(query, count, scope, Span.of(scope), self.scales)
        return self.rank(query, found, count, path, self.scales)

    @cached_property
    def scales(self) -> Vectors:
        """(N,) one over the length of each vector; 0 for a vector of zeros."""
        lengths = np.sqrt(np.einsum("nd,nd->n", self.vectors, self.vectors))
        return np.asarray(np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0), np.float32)

    def rank(
        self, query: Vectors, items: IntArray, count: int, path: str = "gather", scales: Vectors | None = None
    ) -> Retrieval:
        """Score `items` exactly and order them, ties by index; the best `count`. `scales` (N,) multiply the scores."""
        items = np.sort(items)
        rows = np.zeros(ceil(len(items) / ROWS) * ROWS, np.int64)
        rows[: len(items)] = items - 1
        scores = (self.vectors[rows] @ query)[: len(items)]  # (K', D) @ (D,) -> (K,)
        if scales is not None:
            scores *= scales[items - 1]
        if len(items) > max(_SORTED, count):
            kept = np.sort(top(scores, count))
            items, scores = items[kept], scores[kept]
        best = np.argsort(-scores, kind="stable")[:count]
        return Retrieval(items[best], scores[best], path)

    def _approximates(self, span: Span) -> bool:
        """Whether HNSW is asked first."""
        if self.index is None or self.mode is Mode.EXACT:
            return False
        return self.mode is Mode.HNSW or span.allowed > max(EXACT_ITEMS, EXACT_SHARE * len(self.vectors))

    def _exact(
        self,
        query: Vectors,
        count: int,
        scope: Scope,
        span: Span,
        scales: Vectors | None = None,
        scores: Vectors | None = None,
    ) -> tuple[IntArray, str]:
        """Items that `scope` permits with the `count` best among them, and the path that found them.

        `scores` are the products with the prefix, where somebody has made them; they are overwritten.
        """
        if scope.wanted is not None and span.is_gathered(scope):
            found, path = np.flatnonzero(scope.wanted[1 : span.n + 1]) + 1, "gather"
            if len(found) > RANKED * count:
                scores = self._gathered(found - 1, query)  # (R,)
                if scales is not None:
                    scores *= scales[found - 1]
                for barred in (scope.banned, span.blocked):
                    at, there = _sought(found, barred)
                    scores[at[there]] = -np.inf
                found = found[top(scores, count)]
        else:
            scores = self.vectors[: span.n] @ query if scores is None else scores[: span.n]  # (n,)
            if scales is not None:
                scores *= scales[: span.n]
            found, path = self._best(scores, count, scope, span), "exact"
        found = np.concatenate((found, span.extra)) if len(span.extra) else found
        return found[scope.permits(found)], path

    def _gathered(self, rows: IntArray, query: Vectors) -> Vectors:
        """Products of some rows (R,) with a query (D,), piece by piece: (R,).

        All of them at once would be written to fresh memory and read again, which takes several times as long.
        """
        scores = np.empty(len(rows), np.float32)
        piece = np.empty((min(GATHERED, len(rows)), len(query)), np.float32)
        for start in range(0, len(rows), GATHERED):
            some = rows[start : start + GATHERED]
            # `clip` changes nothing, since all rows exist; with the default numpy copies through a buffer of its own.
            here = self.vectors.take(some, axis=0, out=piece[: len(some)], mode="clip")
            np.matmul(here, query, out=scores[start : start + len(some)])
        return scores

    @staticmethod
    def _best(scores: Vectors, count: int, scope: Scope, span: Span) -> IntArray:
        """The `count` best of the prefix by `scores` (n,), what may not be returned masked."""
        scores[scope.banned[: scope.banned.searchsorted(span.n, "right")] - 1] = -np.inf
        scores[span.blocked - 1] = -np.inf
        if scope.wanted is None:
            return top(scores, count) + 1
        rows = np.flatnonzero(scope.wanted[1 : span.n + 1])  # not masked: many equal scores make `top` slow
        return rows[top(scores[rows], count)] + 1

    def _hnsw(self, index: hnswlib.Index, query: Vectors, fetch: int) -> IntArray:
        """About the `fetch` best of all items; none when the index fails."""
        try:
            labels, _ = index.knn_query(query, k=min(fetch, MAX_FETCH, len(self.vectors)), num_threads=1)
        except RuntimeError as error:
            # hnswlib found fewer than it was asked for, and leaks its buffers each time it says so.
            log.warning("HNSW search failed, exact search until the next bundle: %s", error)
            self.index, self.failed = None, True
            return np.zeros(0, np.int64)
        return np.asarray(labels[0], np.int64) + 1


def _sought(ordered: IntArray, items: IntArray) -> tuple[IntArray, BoolArray]:
    """Where each of `items` (E,) is in ascending `ordered`, of which there are some, and whether it is: (E,), (E,)."""
    at: IntArray = ordered.searchsorted(items)
    at[at == len(ordered)] = 0
    return at, np.equal(ordered[at], items)


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


def links(count: int) -> int:
    """M of an HNSW index over `count` items: twice as many where it will be asked, and has many to tell apart."""
    return 32 if count > EXACT_ITEMS else 16


def build_index(
    vectors: Vectors, *, m: int | None = None, ef_construction: int = 200, seed: int = 0, threads: int = 1
) -> hnswlib.Index:
    """An HNSW index over inner products; labels are rows of `vectors`. `m` links an item, by default `links` of them.

    Rows are added in random order: in catalogue order, early items would crowd the upper layers. With several threads
    the order, and so the index, is another one each time.
    """
    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    m = links(len(vectors)) if m is None else m
    index.init_index(max_elements=len(vectors), M=m, ef_construction=ef_construction, random_seed=seed + 100)
    order = np.random.default_rng(seed).permutation(len(vectors))
    index.add_items(vectors[order], order, num_threads=threads)
    return index


def load_index(path: str, width: int, ef: int) -> hnswlib.Index:
    """Load an index and set `ef`, which loading resets and which is shared by all queries.

    Raises ValueError for an index of another width, or one that `check_index` finds wrong.
    """
    check_index(Path(path), width)
    index = hnswlib.Index(space="ip", dim=width)
    index.load_index(path)
    index.set_ef(ef)
    index.set_num_threads(1)
    return index
