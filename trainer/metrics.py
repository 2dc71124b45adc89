"""From ranks and lists to figures: what is reported, how sure it is, and whether one run beats another.

A rank is a target's place in the ranking, 1 is best. C cases, U users, K places, N items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.events import IntArray

Values = NDArray[np.float64]

CUTOFFS: Final = (5, 10, 20)
MISSED: Final = 1 << 40  # the rank of a target that is in no list
RESAMPLES: Final = 1_000
PERMUTATIONS: Final = 10_000
LEVEL: Final = 0.95
CHUNK: Final = 1 << 22  # numbers drawn at once


def case_values(ranks: IntArray, name: str) -> Values:
    """What each case contributes to the metric `name`, (C,): hr@k, ndcg@k, mrr@k, or mrr over all ranks.

    rank 4: hr@5 1, ndcg@5 1 / log2(1 + 4), mrr@5 1 / 4; ndcg@3 0
    """
    kind, _, cutoff = name.partition("@")
    inside = ranks <= int(cutoff) if cutoff else ranks < MISSED
    gains = {"hr": np.ones(len(ranks)), "ndcg": 1 / np.log2(ranks + 1.0), "mrr": 1 / ranks}
    return np.where(inside, gains[kind], 0.0)


def metrics(ranks: IntArray, cutoffs: Sequence[int] = CUTOFFS, users: IntArray | None = None) -> dict[str, float]:
    """Means over cases of ranks (C,).

    ranks 1 and 4: hr@5 = 2/2, ndcg@5 = (1/log2(2) + 1/log2(5)) / 2, mrr = (1/1 + 1/4) / 2

    recall@k is the share of a user's targets found in the first k, averaged over users: hr@k where each user has one
    target, and less swayed by busy users where they have several. `users` (C,) says whose case it is.
    """
    if not len(ranks):
        return {}
    found: dict[str, float] = {}
    for k in cutoffs:
        for kind in ("hr", "ndcg", "mrr"):
            found[f"{kind}@{k}"] = float(np.mean(case_values(ranks, f"{kind}@{k}")))
        hits = case_values(ranks, f"hr@{k}")
        found[f"recall@{k}"] = float(np.mean(hits if users is None else user_means(hits, users)))
    found["mrr"] = float(np.mean(case_values(ranks, "mrr")))
    return found


def user_means(values: NDArray[Any], users: IntArray) -> Values:
    """Mean of each user's cases, (C, ...) to (U, ...), users in ascending order."""
    _, place, count = np.unique(users, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), *values.shape[1:]))
    np.add.at(sums, place, values)
    means: Values = sums / count.reshape(-1, *[1] * (values.ndim - 1))
    return means


# --- what lists look like -----------------------------------------------------------------------------


def list_metrics(lists: IntArray, targets: IntArray, counts: IntArray, k: int = 10) -> dict[str, float]:
    """What the first `k` places of lists (C, K) hold; item indices, 0 where a list is short.

    counts (N + 1,) are training events by item index; targets (C,) are what users really chose.

    - coverage: share of the catalogue that stands in any list.
    - novelty: mean self-information of what is recommended, in bits: -log2 of the item's share of all events, every
      item counted once more than it occurred, so that new items have one (Zhou et al. 2010).
    - popularity_bias: mean popularity percentile of what is recommended, less that of the targets; 0 is as popular as
      people's own choices, above 0 more so.
    """
    shown = lists[:, :k]
    shown = shown[shown > 0]
    if not len(shown):
        return {}
    share = (counts[1:] + 1) / (counts[1:].sum() + len(counts) - 1)  # (N,)
    rank = percentiles(counts[1:])  # (N,)
    recommended, chosen = float(rank[shown - 1].mean()), float(rank[targets - 1].mean())
    return {
        f"coverage@{k}": len(np.unique(shown)) / (len(counts) - 1),
        f"novelty@{k}": float(-np.log2(share[shown - 1]).mean()),
        f"popularity_percentile@{k}": recommended,
        "popularity_percentile_of_targets": chosen,
        f"popularity_bias@{k}": recommended - chosen,
    }


def percentiles(counts: IntArray) -> Values:
    """Share of items that are less popular, plus half of those as popular, itself included; (N,).

    percentiles([5, 1, 1, 9]) -> [0.625, 0.25, 0.25, 0.875]
    """
    ordered = np.sort(counts)
    below, upto = np.searchsorted(ordered, counts, "left"), np.searchsorted(ordered, counts, "right")
    found: Values = (below + upto) / 2 / len(counts)
    return found


# --- how sure ------------------------------------------------------------------------------------------


def intervals(
    ranks: IntArray, users: IntArray, names: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bootstrap interval (95 %, percentiles) of each metric.

    Users are drawn with replacement, each with all of their cases: cases of one user are alike, so drawing cases would
    make intervals too narrow.
    """
    if not len(ranks):
        return {}
    values = np.stack([case_values(ranks, name) for name in names], axis=1)  # (C, M)
    _, place, count = np.unique(users, return_inverse=True, return_counts=True)
    table = np.zeros((len(count), len(names) + 1))  # (U, M + 1): sums, and cases in the last column
    np.add.at(table, place, np.column_stack([values, np.ones(len(values))]))
    drawn = np.concatenate([weights @ table for weights in _resampled(len(count), resamples, seed)])
    low, high = np.quantile(drawn[:, :-1] / drawn[:, -1:], _tails(), axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def _resampled(users: int, resamples: int, seed: int) -> Iterator[Values]:
    """How often each user is drawn in each resample, in chunks (R, U)."""
    rng, size = np.random.default_rng(seed), max(1, CHUNK // users)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = rng.integers(users, size=(rows, users)) + np.arange(rows)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


# --- one run against another ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Run B less run A on the same users."""

    a: float
    b: float
    difference: float
    low: float  # bootstrap interval of the difference, 95 %
    high: float
    p: float  # two-sided, by a paired permutation test
    users: int


def paired(
    a: Values, b: Values, *, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> Paired:
    """Compare values of the same users, (U,) each.

    The test asks how often a difference this large comes about when for every user a coin decides which value belongs
    to which run (Fisher's randomisation test; Smucker et al. 2007). Users without a difference change nothing in it.
    """
    gap = b - a
    drawn = np.concatenate([weights @ gap for weights in _resampled(len(gap), resamples, seed)]) / len(gap)
    low, high = np.quantile(drawn, _tails())
    p = _permutation(gap[gap != 0], permutations, seed)
    return Paired(
        float(a.mean()), float(b.mean()), float(gap.mean()), float(low), float(high), p, len(gap)
    )  # fmt: skip


def _permutation(gap: Values, permutations: int, seed: int) -> float:
    """Share of sign flips, the observed one included, whose sum is at least as far from 0."""
    if not len(gap):
        return 1.0
    rng, size, beyond = np.random.default_rng(seed), max(1, CHUNK // len(gap)), 1
    limit = abs(gap.sum()) * (1 - 1e-12)  # rounding must not tell a flip from its mirror image
    for start in range(0, permutations, size):
        rows = min(size, permutations - start)
        signs = rng.integers(2, size=(rows, len(gap)), dtype=np.int8) * 2.0 - 1.0
        beyond += int(np.count_nonzero(np.abs(signs @ gap) >= limit))
    return beyond / (permutations + 1)
