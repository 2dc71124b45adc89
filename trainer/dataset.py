"""From raw tables to numbered histories, held-out splits and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shared.bundle import AvailabilityInfo, DataInfo
from shared.catalogue import Availability, Catalogue, Item
from shared.categories import field_of
from shared.events import BoolArray, Events, HistoryPolicy, IntArray, history_of
from shared.popularity import Popularity
from shared.times import BEGINNING, END, UNDATED, render
from trainer.config import AvailabilityPolicy, DataConfig
from trainer.errors import TrainerError
from trainer.sources import RawData, load_source
from trainer.sources.vectors import read_vectors


class DatasetError(TrainerError):
    """Data that no model can be trained on."""


@dataclass(frozen=True)
class Dataset:
    """Every event the policy names, sorted by (user, timestamp, arrival), items as indices.

    User u owns rows `offsets[u]:offsets[u + 1]`. A row may feed the sequence, mark its item as seen, or both.
    """

    source: str
    catalogue: Catalogue
    listed: BoolArray  # (N,) whether the source has a row of the item, not only events
    declared: IntArray  # (N,) declared `available_from`, END where there is none
    policy: HistoryPolicy
    users: tuple[str, ...]  # (U,) ids
    offsets: IntArray  # (U + 1,)
    item: IntArray  # (E,) item indices
    timestamp: IntArray  # (E,) epoch microseconds; the place in the file where the data has no times
    feeds: BoolArray  # (E,)
    seen: BoolArray  # (E,)
    has_times: bool
    availability: AvailabilityInfo
    notes: tuple[str, ...]
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)  # field -> (N, d), zeros for none

    @property
    def user(self) -> IntArray:
        """(E,) position in `users` of each row."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.offsets))

    @cached_property
    def info(self) -> DataInfo:
        """What the manifest says of this data; it reads all of them once."""
        digest = hashlib.sha256()
        for part in (self.offsets, self.item, self.timestamp, self.feeds, self.seen):
            digest.update(np.ascontiguousarray(part).data)
        digest.update("\n".join(self.catalogue.items.ids).encode())
        timed = self.has_times and len(self.timestamp) > 0
        return DataInfo(
            source=self.source,
            fingerprint=digest.hexdigest()[:16],
            events=len(self.item),
            users=len(self.users),
            items=len(self.catalogue),
            first_event=render(int(self.timestamp.min())) if timed else None,
            last_event=render(int(self.timestamp.max())) if timed else None,
            has_times=self.has_times,
        )


def load_dataset(config: DataConfig) -> tuple[Dataset, RawData]:
    """Read a source and number it. Raises SourceError for unreadable data, DatasetError for unusable data."""
    raw = load_source(config.source)
    return build_dataset(raw, config), raw


def build_dataset(raw: RawData, config: DataConfig) -> Dataset:
    """Number items and users, sort histories by the policy."""
    events = raw.events
    if events.is_empty():
        raise DatasetError("no event is left: check the source and data.source.min_interactions")
    if not raw.has_times:
        events = events.with_columns(timestamp=pl.int_range(pl.len(), dtype=pl.Int64))
    catalogue, declared, availability = _catalogue(
        events, raw.items, config.availability if raw.has_times else "always"
    )
    users = events["user_id"].unique().sort()
    kinds = events["event_type"].unique().sort()
    histories = history_of(
        Events(
            user=_codes(events["user_id"], users),
            item=_codes(events["item_id"], pl.Series(list(catalogue.items.ids))) + 1,
            kind=_codes(events["event_type"], kinds),
            kinds=tuple(kinds),
            value=events["value"].fill_null(float("nan")).to_numpy(),
            timestamp=events["timestamp"].to_numpy(),
        ),
        config.history,
    )
    kept = histories.feeds | histories.seen
    if not histories.feeds.any():
        raise DatasetError(
            f"no event feeds a sequence: the data has the types {', '.join(kinds)}, "
            f"the policy names {', '.join(config.history.sequence_types)}; set data.history.sequence_types"
        )
    unnamed = [k for k in kinds if not config.history.names(k)]
    notes = [f"event types outside the policy, left out: {', '.join(unnamed)}"] if unnamed else []
    vectors, missing = _item_vectors(raw, config, catalogue)
    counts = np.bincount(histories.user[kept], minlength=len(users))
    return Dataset(
        source=raw.name,
        catalogue=catalogue,
        listed=pl.Series(catalogue.items.ids, dtype=pl.String).is_in(raw.items["item_id"].implode()).to_numpy(),
        declared=declared,
        policy=config.history,
        users=tuple(users),
        offsets=np.concatenate(([0], np.cumsum(counts))),
        item=np.asarray(histories.item[kept], np.int64),
        timestamp=histories.timestamp[kept],
        feeds=histories.feeds[kept],
        seen=histories.seen[kept],
        has_times=raw.has_times,
        availability=availability,
        notes=(*notes, *missing),
        vectors=vectors,
    )


def _item_vectors(
    raw: RawData, config: DataConfig, catalogue: Catalogue
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Field -> (N, d) of the source's own vectors and of the files that the settings name, and what is missing."""
    found, notes = dict(raw.vectors), []
    for name, file in config.vectors.items():
        if file.is_file():
            found[name] = read_vectors(file)
        else:
            notes.append(f"no {file}: items have no vectors of {name}")
    fields = {field_of(category) for named in catalogue.items.category_sets for category in named}
    if both := sorted(fields & found.keys()):
        raise DatasetError(f"{', '.join(both)}: categories and vectors of one name; rename it in data.vectors")
    ids = list(catalogue.items.ids)
    vectors = {name: one.rows_of(ids) for name, one in found.items()}
    for name, rows in vectors.items():
        if bare := int(np.count_nonzero(~rows.any(1))):
            notes.append(f"{bare:,} of {len(ids):,} items have no vector of {name}")
    return vectors, notes


def _codes(column: pl.Series, values: pl.Series) -> IntArray:
    """Position of each element in `values`, (E,) int64."""
    table = pl.DataFrame({"value": values, "code": np.arange(len(values), dtype=np.int64)})
    joined = pl.DataFrame({"value": column}).join(table, on="value", how="left", maintain_order="left")
    return joined["code"].to_numpy()


def _catalogue(
    events: pl.DataFrame, items: pl.DataFrame, policy: AvailabilityPolicy
) -> tuple[Catalogue, IntArray, AvailabilityInfo]:
    """All items of the table and of the events, with the earlier of declared date and first event.

    A release year is coarse and often wrong; an event proves that the item was there. Of an item without date and
    event nobody knows when it began: it exists from the end of the data on, so that it is in nobody's future.
    """
    clocked = events.select("item_id", "timestamp")  # the others would be copied, of every event
    clocked = clocked.filter(pl.col("timestamp") >= UNDATED) if policy == "first_event" else clocked.clear()
    first = events.select("item_id").unique().join(
        clocked.group_by("item_id").agg(first=pl.col("timestamp").min()), on="item_id", how="left"
    )  # fmt: skip
    rows = items.join(first.with_columns(used=pl.lit(value=True)), on="item_id", how="full", coalesce=True)
    with_date = items.select("item_id", "available_from").drop_nulls()
    dated = clocked.join(with_date, on="item_id", how="inner")
    tally = {"declared": 0, "from_first_event": 0, "always": 0, "from_data_end": 0, "contradicted": 0, "never": 0}
    end = int(clocked["timestamp"].max()) if len(clocked) else BEGINNING  # type: ignore[arg-type]
    numbered, declared_by_id = [], {}
    for row in rows.iter_rows(named=True):
        declared, seen_first = row["available_from"], row["first"]
        ends = END if row["available_until"] is None else row["available_until"]
        known = [t for t in (declared, seen_first) if t is not None]
        unknown = BEGINNING if row["used"] else min(end, ends - 1)
        tally["declared"] += declared is not None
        tally["from_first_event"] += declared is None and seen_first is not None
        tally["always"] += not known and unknown == BEGINNING
        tally["from_data_end"] += not known and unknown != BEGINNING
        starts = min(known, default=unknown)
        tally["never"] += starts >= ends
        tally["contradicted"] += declared is not None and seen_first is not None and seen_first < declared
        declared_by_id[row["item_id"]] = END if declared is None else declared
        numbered.append(
            Item(
                item_id=row["item_id"],
                title=row["title"],
                categories=tuple(row["categories"] or ()),
                available_from=starts,
                available_until=ends,
                withdrawn=bool(row["withdrawn"]),
            )
        )
    early = dated.filter(pl.col("timestamp") < pl.col("available_from")).height
    catalogue = Catalogue.number(numbered)
    dates = np.array([declared_by_id[item_id] for item_id in catalogue.items.ids], np.int64)
    return catalogue, dates, AvailabilityInfo(policy=policy, events_before_declared=early, **tally)


# --- splits -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cases:
    """Held-out events to be guessed. The history of case c is the rows of its user before `row[c]`.

    Cut by position, not by time: where events share a second, a cut by time would put the answer into the history.
    """

    dataset: Dataset
    user: IntArray  # (C,)
    row: IntArray  # (C,) the target's row

    def __len__(self) -> int:
        return len(self.row)

    @property
    def target(self) -> IntArray:
        """(C,) item indices to be guessed."""
        return self.dataset.item[self.row]

    @property
    def timestamp(self) -> IntArray:
        """(C,) when the target happened."""
        return self.dataset.timestamp[self.row]

    def histories(self) -> list[IntArray]:
        """Item indices that feed the sequence before each target, oldest first."""
        return self._before(self.dataset.feeds)

    def times(self) -> list[IntArray]:
        """When the events of `histories` happened, and last when the target did: what an encoder's clock is told."""
        starts = self.dataset.offsets[self.user]
        feeds, clock = self.dataset.feeds, self.dataset.timestamp
        rows = zip(starts, self.row, strict=True)
        return [np.append(clock[a:b][feeds[a:b]], clock[b]) for a, b in rows]

    def seen(self) -> list[IntArray]:
        """Item indices seen before each target."""
        return self._before(self.dataset.seen)

    def _before(self, which: BoolArray) -> list[IntArray]:
        starts = self.dataset.offsets[self.user]
        rows = zip(starts, self.row, strict=True)
        return [self.dataset.item[a:b][which[a:b]] for a, b in rows]

    def sample(self, count: int, seed: int) -> Cases:
        """At most `count` of the cases, in order."""
        if count >= len(self):
            return self
        pick = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        return Cases(self.dataset, self.user[pick], self.row[pick])


@dataclass(frozen=True)
class Split:
    """What is trained on, and what is held out."""

    sequences: Sequences
    popularity: Popularity  # of the training events alone
    rule: Availability  # as known from declared dates and training events alone
    validation: Cases
    test: Cases
    protocol: str = "leave-one-out"


@dataclass(frozen=True)
class Sequences:
    """Training sequences in one array: sequence s is `item[starts[s]:stops[s]]`, oldest first."""

    item: IntArray  # (E,)
    starts: IntArray  # (S,)
    stops: IntArray  # (S,)
    time: IntArray | None = None  # (E,) epoch microseconds; None where the data has none

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> IntArray:
        """(S,) events in each sequence."""
        return self.stops - self.starts


def everything(dataset: Dataset) -> tuple[Sequences, Popularity]:
    """All events, for the refit that is published."""
    return training_part(dataset, dataset.offsets[1:])


def leave_one_out(dataset: Dataset) -> Split:
    """The last event of each user is the test, the one before it the validation, the rest is trained on.

    Users with fewer than three events are trained on and not asked.
    """
    last, second = _last_feeding_rows(dataset)
    asked = np.flatnonzero(second >= 0)
    stops = dataset.offsets[1:].copy()
    stops[asked] = second[asked]
    sequences, popularity = training_part(dataset, stops)
    rule = training_rule(dataset, stops)
    return Split(sequences, popularity, rule, Cases(dataset, asked, second[asked]), Cases(dataset, asked, last[asked]))


def _last_feeding_rows(dataset: Dataset) -> tuple[IntArray, IntArray]:
    """Rows of the last and the second last event of each user's sequence, (U,); -1 for users with under three."""
    rows = np.flatnonzero(dataset.feeds)
    counts = np.bincount(dataset.user[rows], minlength=len(dataset.users))
    ends = np.cumsum(counts)
    enough = counts >= 3
    last, second = np.full(len(counts), -1), np.full(len(counts), -1)
    last[enough], second[enough] = rows[ends[enough] - 1], rows[ends[enough] - 2]
    return last, second


def training_rule(dataset: Dataset, stops: IntArray) -> Availability:
    """Which items exist when, by what is known without held-out events: the rows of each user before `stops` (U,).

    An item exists from the earlier of its declared date and its first training event; with neither it never does.
    The catalogue's own dates count held-out events too, so a target would vouch for its own item. A training event
    without a clock proves that its item was there, and dates nothing. Without times there is no such rule.
    """
    if not dataset.has_times:
        return Availability.open(len(dataset.catalogue))
    if dataset.availability.policy == "always":
        return Availability.of(dataset.catalogue)
    inside = np.arange(len(dataset.item)) < stops[dataset.user]
    clocked = inside & (dataset.timestamp >= UNDATED)
    starts = np.concatenate(([END], dataset.declared))  # (N + 1,)
    np.minimum.at(starts, dataset.item[clocked], dataset.timestamp[clocked])
    placed = dataset.item[inside & ~clocked]
    starts[placed] = np.where(starts[placed] == END, BEGINNING, starts[placed])
    return Availability.starting(dataset.catalogue, starts[1:])


def training_part(dataset: Dataset, stops: IntArray) -> tuple[Sequences, Popularity]:
    """Sequences and popularity of the rows of each user before `stops` (U,)."""
    inside = np.arange(len(dataset.item)) < stops[dataset.user]
    used = inside & dataset.feeds
    counts = np.bincount(dataset.user[used], minlength=len(dataset.users))
    ends = np.cumsum(counts)
    some = counts > 0
    item = dataset.item[used]
    time = dataset.timestamp[used]
    popularity = Popularity.of_events(item, time, len(dataset.catalogue))
    return Sequences(item, (ends - counts)[some], ends[some], time if dataset.has_times else None), popularity


# --- batches ------------------------------------------------------------------------------------------


def batches(lengths: IntArray, batch_size: int, rng: np.random.Generator, window: int = 20) -> Iterator[IntArray]:
    """Shuffled batches of sequences with similar lengths; each a row of positions (B,).

    Sorting by length inside shuffled windows of `window` batches saves most of the padding and keeps
    batches random enough; sorting everything would show the model the same neighbours each epoch.
    """
    order = rng.permutation(len(lengths))
    groups = []
    for start in range(0, len(order), batch_size * window):
        part = order[start : start + batch_size * window]
        part = part[np.argsort(lengths[part], kind="stable")]
        groups += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    for at in rng.permutation(len(groups)):
        yield groups[at]
