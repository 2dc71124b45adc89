"""Metrics by ranking the full catalogue, in torch and through the bundle, beside popularity.

Rules: what the user saw before the target is filtered, the whole of it; ties rank pessimistically;
no sampled negatives. Figures that are compared with papers know no availability rule; what the rule
touches is reported beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.catalogue import Availability
from shared.encoder import Encoder, Vectors
from shared.events import IntArray
from shared.popularity import RECENT_DAYS, Popularity
from shared.retrieval import Retriever, Scope
from trainer.dataset import Cases

CUTOFFS: Final = (5, 10, 20)
TOP: Final = 20
MISSED: Final = 1 << 40  # the rank of a target that is in no list
Scores = Callable[[IntArray], NDArray[np.floating[Any]]]
"""Positions of cases (C,) to scores of all items (C, N)."""


def metrics(ranks: IntArray) -> dict[str, float]:
    """Means over cases of ranks (C,), 1 is best.

    ranks 1 and 4: hr@5 = 2/2, ndcg@5 = (1/log2(2) + 1/log2(5)) / 2, mrr = (1/1 + 1/4) / 2
    """
    if not len(ranks):
        return {}
    found: dict[str, float] = {}
    gain = 1 / np.log2(ranks + 1.0)
    for k in CUTOFFS:
        found[f"hr@{k}"] = float(np.mean(ranks <= k))
        found[f"ndcg@{k}"] = float(np.mean(np.where(ranks <= k, gain, 0)))
    found["mrr"] = float(np.mean(np.where(ranks < MISSED, 1 / ranks, 0)))
    return found


def full_ranks(cases: Cases, scores: Scores, chunk: int = 256) -> IntArray:
    """Rank of each target among all items, seen ones left out; (C,). Ties count against the target.

    A target that the user had seen before cannot be recommended and is missed.
    """
    ranks = np.empty(len(cases), np.int64)
    targets, seen = cases.target, cases.seen()
    for start in range(0, len(cases), chunk):
        part = np.arange(start, min(start + chunk, len(cases)))
        table = np.array(scores(part), np.float32)  # (c, N), a copy: seen items are struck out in it
        wanted = table[np.arange(len(part)), targets[part] - 1]  # (c,)
        for row, case in zip(table, part, strict=True):
            row[seen[case] - 1] = -np.inf
        again = table[np.arange(len(part)), targets[part] - 1] == -np.inf
        # Counts the target itself, which makes it a rank from 1. `not <`: nan counts against the target too.
        ahead = (~(table < wanted[:, None])).sum(1)
        ranks[part] = np.where(again, MISSED, ahead)
    return ranks


def vector_scores(queries: Vectors, vectors: Vectors) -> Scores:
    """Scores of an encoder: dot products of queries (C, D) and vectors (N, D)."""
    return lambda part: queries[part] @ vectors.T


def popularity_scores(cases: Cases, popularity: Popularity, window: int | None) -> Scores:
    """Counts of training events before each target's day, in `window` days or since ever."""
    times = cases.timestamp

    def scores(part: IntArray) -> NDArray[np.floating[Any]]:
        return np.stack([popularity.popular(int(times[case]), window)[1:] for case in part]).astype(np.float32)

    return scores


def baselines(cases: Cases, popularity: Popularity, *, timed: bool) -> dict[str, dict[str, float]]:
    """What popularity alone reaches on the same cases."""
    if not timed:  # without times every training event is "before"
        counts = popularity.popular(1 << 61)[1:].astype(np.float32)
        return {"popular": metrics(full_ranks(cases, lambda part: np.tile(counts, (len(part), 1))))}
    windows = {"popular": None, f"popular_{RECENT_DAYS}d": RECENT_DAYS}
    return {name: metrics(full_ranks(cases, popularity_scores(cases, popularity, w))) for name, w in windows.items()}


def encode_cases(encoder: Encoder, histories: Sequence[IntArray]) -> tuple[IntArray, Vectors]:
    """Query vectors of the cases that have a history: their positions (C',) and vectors (C', D)."""
    asked = np.array([c for c, h in enumerate(histories) if len(h)], np.int64)
    return asked, encoder.encode([histories[c] for c in asked])


def served_ranks(cases: Cases, encoder: Encoder, retriever: Retriever, availability: Availability) -> IntArray:
    """Ranks as a user of the service sees them: the place in the top-20 list from ONNX and retrieval, (C,)."""
    ranks = np.full(len(cases), MISSED, np.int64)
    targets, seen, times = cases.target, cases.seen(), cases.timestamp
    asked, queries = encode_cases(encoder, cases.histories())
    for case, query in zip(asked, queries, strict=True):
        scope = Scope(availability, int(times[case]), np.unique(seen[case]))
        place = np.flatnonzero(retriever.retrieve(query, TOP, scope).items == targets[case])
        if len(place):
            ranks[case] = place[0] + 1
    return ranks


def evaluate_served(cases: Cases, encoder: Encoder, retriever: Retriever, rule: Availability) -> dict[str, Any]:
    """Metrics through the bundle, without and with the availability rule of the split, and what the rule touches."""
    catalogue = cases.dataset.catalogue
    open_ranks = served_ranks(cases, encoder, retriever, Availability.open(len(catalogue)))
    ruled_ranks = served_ranks(cases, encoder, retriever, rule)
    times = cases.timestamp
    hidden = [not rule.allowed(np.array([t]), int(at))[0] for t, at in zip(cases.target, times, strict=True)]
    fewer = [items_hidden(rule, int(at)) for at in times]
    return {
        "cases": len(cases),
        **metrics(open_ranks),
        "availability_rule": {
            **{name: value for name, value in metrics(ruled_ranks).items() if name.endswith("@10")},
            "targets_hidden": int(np.sum(hidden)),
            "users_touched": int(np.count_nonzero(fewer)),
            "items_hidden_mean": float(np.mean(fewer)) if fewer else 0.0,
        },
    }


def items_hidden(rule: Availability, as_of: int) -> int:
    """How many items of the catalogue do not exist at `as_of`."""
    blocked, extra = rule.exceptions(as_of)
    return len(rule.numbering) - rule.prefix(as_of) + len(blocked) - len(extra)


def index_recall(queries: Vectors, retriever: Retriever, k: int) -> float:
    """Share of the exact top k that HNSW alone finds, over all queries."""
    if retriever.index is None or not len(queries):
        return float("nan")
    k = min(k, len(retriever.vectors))
    labels, _ = retriever.index.knn_query(queries, k=k, num_threads=1)
    exact = np.argpartition(-(queries @ retriever.vectors.T), k - 1, axis=1)[:, :k]
    hits = [len(np.intersect1d(a, b)) for a, b in zip(labels.astype(np.int64), exact, strict=True)]
    return float(np.mean(hits) / k)
