"""Ranks in the full catalogue, in torch and through the bundle.

Rules: what the user saw before the target is filtered, the whole of it; ties rank pessimistically;
no sampled negatives. Figures that are compared with papers know no availability rule; what the rule
touches is reported beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.catalogue import Availability
from shared.encoder import Encoder, Vectors
from shared.events import IntArray
from shared.popularity import Popularity
from shared.retrieval import Retrieval, Retriever, Scope
from shared.times import END
from trainer.dataset import Cases
from trainer.metrics import CUTOFFS, MISSED, intervals, list_metrics, metrics

TOP: Final = 20
RECALL_CHUNK: Final = 64
Scores = Callable[[IntArray], NDArray[np.floating[Any]]]
"""Positions of cases (C,) to scores of all items (C, N)."""


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


def encode_cases(encoder: Encoder, cases: Cases) -> tuple[IntArray, Vectors]:
    """Query vectors of the cases that have a history: their positions (C',) and vectors (C', D)."""
    histories = cases.histories()
    asked = np.array([c for c, h in enumerate(histories) if len(h)], np.int64)
    times = None if encoder.spec.clock == "none" else cases.times()
    return asked, encoder.encode([histories[c] for c in asked], None if times is None else [times[c] for c in asked])


class Lists(NamedTuple):
    """What users of the service see, and what it is worth."""

    items: IntArray  # (C, K) item indices, best first, 0 where a list is short
    ranks: IntArray  # (C,) place of the target from 1, behind all of its score; MISSED where that is beyond K


@dataclass(frozen=True)
class Served:
    """The lists for some cases."""

    free: Lists  # every item may be recommended at all times, as in papers
    ruled: Lists  # by the availability rule at each target's time


def served_lists(cases: Cases, encoder: Encoder, retriever: Retriever, rule: Availability, top: int = TOP) -> Served:
    """Lists from ONNX and retrieval, without and with the availability rule."""
    free, ruled = (Lists(np.zeros((len(cases), top), np.int64), np.full(len(cases), MISSED)) for _ in range(2))
    everything, seen, times = Availability.open(len(cases.dataset.catalogue)), cases.seen(), cases.timestamp
    targets = cases.target
    asked, queries = encode_cases(encoder, cases)
    for case, query in zip(asked, queries, strict=True):
        banned = np.unique(seen[case])
        for lists, availability in ((free, everything), (ruled, rule)):
            # One more than is shown: it tells whether the last score shown is that of others, too.
            found = retriever.retrieve(query, top + 1, Scope(availability, int(times[case]), banned))
            shown = found.items[:top]
            lists.items[case, : len(shown)] = shown
            place = place_of(found, int(targets[case]))
            lists.ranks[case] = place if place <= top else MISSED
    return Served(free, ruled)


def place_of(found: Retrieval, target: int) -> int:
    """Rank of an item in a list, from 1; equal scores, which a list has by index, all count against it."""
    at = np.flatnonzero(found.items == target)
    if not len(at):
        return MISSED
    return int(np.flatnonzero(~(found.scores < found.scores[at[0]]))[-1]) + 1


def served_metrics(
    cases: Cases, served: Served, rule: Availability, popularity: Popularity, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Any]:
    """Metrics of lists, without and with the availability rule, and what the rule touches."""
    targets, times, counts = cases.target, cases.timestamp, popularity.popular(END)
    hidden = [not rule.allowed(np.array([t]), int(at))[0] for t, at in zip(targets, times, strict=True)]
    fewer = [items_hidden(rule, int(at)) for at in times]
    ranks, ruled = served.free.ranks, metrics(served.ruled.ranks, cutoffs, cases.user)
    return {
        "cases": len(cases),
        "users": len(np.unique(cases.user)),
        **metrics(ranks, cutoffs, cases.user),
        "intervals": intervals(ranks, cases.user, [f"{kind}@{k}" for kind in ("hr", "ndcg") for k in cutoffs]),
        "lists": list_metrics(served.free.items, targets, counts),
        "targets_without_training_event": int(np.count_nonzero(counts[targets] == 0)),
        "availability_rule": {
            **{name: value for name, value in ruled.items() if name.endswith("@10")},
            "targets_hidden": int(np.sum(hidden)),
            "users_touched": len(np.unique(cases.user[np.array(fewer, np.int64) > 0])),
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
    hits = 0
    for start in range(0, len(queries), RECALL_CHUNK):  # a score for each item and query of a chunk
        some = queries[start : start + RECALL_CHUNK]
        labels, _ = retriever.index.knn_query(some, k=k, num_threads=1)
        exact = np.argpartition(-(some @ retriever.vectors.T), k - 1, axis=1)[:, :k]
        hits += sum(len(np.intersect1d(a, b)) for a, b in zip(labels.astype(np.int64), exact, strict=True))
    return hits / (k * len(queries))
