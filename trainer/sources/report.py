"""What a source hands over: events, items, and a report of what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from shared.times import render
from trainer.sources.vectors import ItemVectors

EVENTS_SCHEMA = pl.Schema(
    {
        "user_id": pl.String(),
        "item_id": pl.String(),
        "event_type": pl.String(),
        "value": pl.Float64(),
        "timestamp": pl.Int64(),
    }
)
ITEMS_SCHEMA = pl.Schema(
    {
        "item_id": pl.String(),
        "title": pl.String(),
        "categories": pl.List(pl.String()),
        "available_from": pl.Int64(),
        "available_until": pl.Int64(),
        "withdrawn": pl.Boolean(),
    }
)
NO_TIMES = "no times: the order of the file counts, time rules are off"
BELOW_MINIMUM = "below min_interactions"
QUANTILES = {"min": 0.0, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0}


@dataclass(frozen=True)
class BadRows:
    """How many rows of a table are bad for one reason, and the first of them as `file:line: reason`."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class TableReport:
    """rows_read = rows_kept + the bad rows + the rows left out on purpose."""

    name: str
    rows_read: int
    rows_kept: int
    bad: Mapping[str, BadRows] = field(default_factory=dict)  # reason -> rows
    left_out: Mapping[str, int] = field(default_factory=dict)  # reason -> rows

    @property
    def rows_bad(self) -> int:
        """Bad rows of all reasons."""
        return sum(rows.count for rows in self.bad.values())


@dataclass(frozen=True)
class SourceReport:
    """What was read from each file or table, and what the run should say about it."""

    events: TableReport
    items: tuple[TableReport, ...] = ()
    notes: tuple[str, ...] = ()
    terms: str | None = None  # terms of use of the data set, to be printed

    @property
    def tables(self) -> tuple[TableReport, ...]:
        """The events first, then each table of items."""
        return (self.events, *self.items)


@dataclass(frozen=True)
class RawData:
    """Somebody's data in the one form that the trainer reads.

    events: user_id str, item_id str, event_type str, value f64 or null, timestamp i64, epoch microseconds.
        Row order is arrival order. Repeated events are kept. Without times every timestamp is null.
    items: one row an item that the source declares: item_id str, title str or null, categories list of
        "field:value", available_from and available_until i64 microseconds or null, withdrawn bool.
        Events may name items that are not here.
    vectors: field -> vectors that the source holds, of any items.
    """

    name: str
    events: pl.DataFrame
    items: pl.DataFrame
    report: SourceReport
    has_times: bool
    vectors: Mapping[str, ItemVectors] = field(default_factory=dict)


def describe(raw: RawData) -> str:
    """A plain text table of what a source holds, for people."""
    return "\n".join(_aligned(_numbers(raw)) + _problems(raw.report))


def _numbers(raw: RawData) -> list[tuple[str, str]]:
    events, items = raw.events, raw.items
    per_user = events.group_by("user_id").len()["len"]
    used = events["item_id"].unique()
    undeclared = used.len() - used.is_in(items["item_id"].implode()).sum()
    dated = items["available_from"].count()
    types = events["event_type"].value_counts(sort=True).rows()
    return [
        ("source", raw.name),
        ("events", f"{events.height:,}"),
        ("users", f"{per_user.len():,}"),
        ("items with events", f"{used.len():,} ({undeclared:,} not declared)"),
        ("items declared", f"{items.height:,} ({dated:,} with a date, {items.height - dated:,} without)"),
        ("event types", ", ".join(f"{name} {count:,}" for name, count in types) or "none"),
        ("times", _time_range(raw)),
        ("events a user", ", ".join(f"{name} {_quantile(per_user, q)}" for name, q in QUANTILES.items())),
        ("before the item's date", _share_before(raw)),
        *((f"vectors of {name}", f"{len(v.item_ids):,}, width {v.values.shape[1]}") for name, v in raw.vectors.items()),
    ]


def _quantile(counts: pl.Series, q: float) -> str:
    value = counts.quantile(q, interpolation="nearest")
    return "-" if value is None else f"{value:,.0f}"


def _time_range(raw: RawData) -> str:
    times = raw.events["timestamp"]
    oldest, newest = times.min(), times.max()
    if not isinstance(oldest, int) or not isinstance(newest, int):
        return "none"
    return f"{render(oldest)} to {render(newest)}"


def _share_before(raw: RawData) -> str:
    if not raw.has_times:
        return "unknown: no times"
    dates = raw.items.select("item_id", "available_from")
    dated = raw.events.join(dates, on="item_id", how="inner").filter(pl.col("available_from").is_not_null())
    early = dated.filter(pl.col("timestamp") < pl.col("available_from")).height
    share = early / dated.height if dated.height else 0.0
    return f"{early:,} of {dated.height:,} events of dated items ({share:.2%})"


def _problems(report: SourceReport) -> list[str]:
    lines: list[str] = []
    for table in report.tables:
        lines.append(f"{table.name}: {table.rows_read:,} rows read, {table.rows_kept:,} kept")
        lines += [f"  left out: {reason}: {count:,}" for reason, count in table.left_out.items()]
        for reason, rows in table.bad.items():
            lines.append(f"  bad: {reason}: {rows.count:,}")
            lines += [f"    {example}" for example in rows.examples]
    return lines + [f"note: {note}" for note in report.notes]


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]
