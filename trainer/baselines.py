"""What a model has to beat: popularity before each target, and EASE.

Ranked over the full catalogue by the same function as the models, with the same items left out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shared.events import IntArray
from shared.popularity import Popularity
from shared.times import DAY
from trainer.config import EvaluationConfig
from trainer.dataset import Cases, Dataset, Sequences, Split
from trainer.evaluate import Scores, full_ranks

WINDOWS: Final = {"popular": None, "popular_7d": 7, "popular_30d": 30}
"""Name -> days before the target's day that count; None for all."""
EASE_ITEMS: Final = 20_000  # N x N float32 twice: 3.2 GB here, and minutes

Table = NDArray[np.float32]


class TooManyItemsError(Exception):
    """A catalogue too large for a method that holds a number for each pair of items."""


def rival_ranks(split: Split, config: EvaluationConfig) -> tuple[dict[str, IntArray], list[str]]:
    """Ranks (C,) of the test targets by each baseline, and notes on what was left out and why."""
    cases, dataset = split.test, split.test.dataset
    if not len(cases):
        return {}, []
    found = popularity_ranks(cases, split.popularity, timed=dataset.has_times)
    notes = []
    if config.ease:
        try:
            found["ease"] = full_ranks(cases, ease_scores(cases, ease(split.sequences, dataset, config.ease_l2)))
        except TooManyItemsError as error:
            notes.append(f"EASE is left out: {error}")
    return found, notes


# --- popularity ---------------------------------------------------------------------------------------


def popularity_ranks(cases: Cases, popularity: Popularity, *, timed: bool) -> dict[str, IntArray]:
    """Ranks by popularity of all time, and of the last 7 and 30 days, at each target's time."""
    if not timed:  # without times every training event is "before"
        counts = popularity.popular(1 << 61)[1:].astype(np.float32)
        return {"popular": full_ranks(cases, lambda part: np.tile(counts, (len(part), 1)))}
    return {name: full_ranks(cases, popularity_scores(cases, popularity, days)) for name, days in WINDOWS.items()}


def popularity_scores(cases: Cases, popularity: Popularity, window: int | None) -> Scores:
    """Counts of training events before each target's day, in `window` days or since ever.

    For targets after the end of the training events (a temporal split) the last days of training count: the model
    was not trained on later ones either.
    """
    days = np.minimum(cases.timestamp // DAY, popularity.end)  # (C,)
    counts = lru_cache(maxsize=1024)(lambda day: popularity.popular(day * DAY, window)[1:].astype(np.float32))
    return lambda part: np.stack([counts(int(day)) for day in days[part]])


# --- EASE ---------------------------------------------------------------------------------------------


def ease(sequences: Sequences, dataset: Dataset, l2: float) -> Table:
    """Item weights B (N, N), zero on the diagonal, that rebuild each user's items from their other items.

    The closed form of Steck (2019), "Embarrassingly Shallow Autoencoders for Sparse Data", equation 8:
    P = (X'X + l2 I)^-1, B = I - P / diag(P), with X the users by items of the training events, 0 or 1.
    Raises TooManyItemsError.
    """
    N = len(dataset.catalogue)
    if N > EASE_ITEMS:
        raise TooManyItemsError(f"it needs a table of {N:,} x {N:,} items, and {EASE_ITEMS:,} items are its limit")
    gram = np.zeros((N, N), np.float32)
    for start, stop in zip(sequences.starts, sequences.stops, strict=True):
        items = np.unique(sequences.item[start:stop]) - 1
        gram[np.ix_(items, items)] += 1
    gram[np.diag_indices(N)] += l2
    inverse: Table = np.linalg.inv(gram)
    weights: Table = inverse / -np.diag(inverse)
    weights[np.diag_indices(N)] = 0
    return weights


def ease_scores(cases: Cases, weights: Table) -> Scores:
    """Sum of the weights of the items in each history; it knows no order."""
    histories = cases.histories()

    def scores(part: IntArray) -> NDArray[np.floating[Any]]:
        return np.stack([weights[np.unique(histories[case]) - 1].sum(0) for case in part])

    return scores
