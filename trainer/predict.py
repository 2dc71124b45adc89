"""Top-K lists for all users, by the live bundle's own code, under the availability rule at each user's last event."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from shared.bundle import Bundle, Model
from shared.catalogue import Availability, ItemChange
from shared.events import FloatArray, IntArray
from shared.retrieval import Scope
from shared.times import END, UNDATED, now, render
from trainer.config import ConfigError
from trainer.dataset import Dataset
from trainer.evaluate import items_hidden


@dataclass(frozen=True)
class Excluded:
    """What the rules kept out of the lists."""

    users: int
    unavailable: int  # (user, item) pairs that did not exist yet, or no more
    users_touched: int  # users for whom at least one item was unavailable
    future_in_lists: int  # items of the unruled top-K that the rule replaced
    without_history: int  # users answered by popularity


@dataclass(frozen=True)
class Asked:
    """A user's history as the service would have read it at their newest event."""

    fed: IntArray  # rows of the data that feed the sequence
    history: IntArray  # (L,) the bundle's indices of their items, without unknown ones
    times: IntArray  # (L + 1,) when these happened, and last `as_of`
    seen: IntArray  # the bundle's indices, sorted
    timed: bool  # otherwise all of it has just happened, as for the service

    @property
    def as_of(self) -> int:
        """The time asked about."""
        return int(self.times[-1])


def ask(dataset: Dataset, mapped: IntArray, user: int) -> Asked | None:
    """What is asked about a user; None for one without events. `mapped`: see `to_bundle`."""
    rows = np.arange(dataset.offsets[user], dataset.offsets[user + 1])
    if not len(rows):
        return None
    newest = int(dataset.timestamp[rows[-1]])
    timed = dataset.has_times and newest >= UNDATED
    as_of = newest if timed else now()
    fed, marked = rows[dataset.feeds[rows]], rows[dataset.seen[rows]]
    known = fed[mapped[fed] > 0]
    times = dataset.timestamp[known] if timed else np.full(len(known), as_of, np.int64)
    seen = np.unique(mapped[marked])
    return Asked(fed, mapped[known], np.append(times, as_of), seen[seen > 0], timed)


def predict(bundle: Bundle, dataset: Dataset, name: str, k: int) -> tuple[pl.DataFrame, Excluded]:
    """Columns user_id, rank, item_id, score, as_of; `dataset` items are mapped to the bundle's by id.

    Availability is the bundle's with what the data says today on top: an item withdrawn since is in no list. Without
    times items are judged at now, and `as_of` is null.
    """
    model, rule = bundle.models[name], _rule(bundle, dataset)
    everything = Availability.open(len(bundle.catalogue))
    mapped = to_bundle(bundle, dataset)
    rows: list[pl.DataFrame] = []
    unavailable = touched = replaced = lonely = 0
    for user, user_id in enumerate(dataset.users):
        if (asked := ask(dataset, mapped, user)) is None:
            continue
        scope = Scope(rule, asked.as_of, asked.seen)
        hidden = items_hidden(rule, asked.as_of)
        unavailable, touched = unavailable + hidden, touched + (hidden > 0)
        if len(asked.history):
            items, scores, late = _model_list(model, asked, scope, everything, k)
            replaced += late
        else:
            items, scores = popular_list(bundle, scope, k)
            lonely += 1
        rows.append(_rows(bundle, user_id, items, scores, asked.as_of if asked.timed else None))
    table = pl.concat(rows) if rows else _rows(bundle, "", np.zeros(0, np.int64), np.zeros(0), None)
    return table, Excluded(len(rows), unavailable, touched, replaced, lonely)


def _rule(bundle: Bundle, dataset: Dataset) -> Availability:
    """The bundle's availability, changed to what the data says of the items that both have rows of.

    An item that only events name is as the bundle says: an event does not bring back what was withdrawn.
    """
    changes = (
        ItemChange(
            i.item_id, None, None, None if declared == END else i.available_from, i.available_until, i.withdrawn, 0
        )
        for i, declared, listed in zip(dataset.catalogue.items, dataset.declared, dataset.listed, strict=True)
        if listed
    )
    return Availability.of(bundle.catalogue).changed(bundle.catalogue, changes)


def to_bundle(bundle: Bundle, dataset: Dataset) -> IntArray:
    """(E,) the bundle's index of each row's item; 0 where the bundle does not know it."""
    table = np.array([0, *bundle.catalogue.index_by_id.of_ids(dataset.catalogue.items.ids)], np.int64)
    return table[dataset.item]


def _model_list(
    model: Model, asked: Asked, scope: Scope, everything: Availability, k: int
) -> tuple[IntArray, FloatArray, int]:
    """The user's list, and how many items of the list without the rule are not in it by the rule."""
    (query,) = model.encoder.encode([asked.history], [asked.times])
    found = model.retriever.retrieve(query, k, scope)
    unruled = model.retriever.retrieve(query, k, Scope(everything, scope.as_of, scope.banned)).items
    late = int(np.count_nonzero(~scope.availability.allowed(unruled, scope.as_of)))
    return found.items, found.scores.astype(np.float64), late


def popular_list(bundle: Bundle, scope: Scope, k: int) -> tuple[IntArray, FloatArray]:
    """The most popular items that the scope permits, and nan for scores."""
    items = bundle.popularity.fallback(scope.as_of)
    items = items[scope.permits(items)][:k]
    return items, np.full(len(items), np.nan)


def _rows(bundle: Bundle, user_id: str, items: IntArray, scores: FloatArray, as_of: int | None) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": [user_id] * len(items),
            "rank": np.arange(1, len(items) + 1),
            "item_id": [bundle.catalogue.items.ids[i - 1] for i in items.tolist()],
            "score": scores,
            "as_of": [None if as_of is None else render(as_of)] * len(items),
        },
        schema={"user_id": pl.String, "rank": pl.Int64, "item_id": pl.String, "score": pl.Float64, "as_of": pl.String},
    )


def write_table(table: pl.DataFrame, path: Path) -> None:
    """CSV or Parquet, by the suffix. Raises ConfigError for another."""
    check_table(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        table.write_csv(path)
    else:
        table.write_parquet(path)


def check_table(path: Path) -> None:
    """Raise ConfigError for a file that `write_table` cannot write: better before the work than after it."""
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"{path.name}: write to a file that ends in .csv or .parquet")
