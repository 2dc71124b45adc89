"""From tables as they were read to events and items: ids, times and values checked, bad rows reported.

A row is bad if it breaks one of the rules below; the first rule it breaks is its reason. Rules are Polars
expressions, so a good row costs no Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from shared.events import EVENT_TYPE_PATTERN
from trainer.sources.config import TimeUnit
from trainer.sources.errors import EmptySourceError, InvalidSourceError, TooManyBadRowsError
from trainer.sources.ids import id_text
from trainer.sources.report import BELOW_MINIMUM, EVENTS_SCHEMA, ITEMS_SCHEMA, BadRows, TableReport
from trainer.sources.tables import Table
from trainer.sources.times import FIRST_YEAR, LAST_YEAR, UNIT_NAMES, read_times, year_start

EXAMPLES = 5  # rows shown for each reason
LONGEST_EXAMPLE = 100  # characters of a value that are shown
CATEGORY = "category:"  # role of a column of categories: "category:genre"; with no field, values are "field:value"
TRUE_TEXTS, FALSE_TEXTS = ("true", "1", "yes"), ("false", "0", "no")


@dataclass(frozen=True)
class Rule:
    """Rows for which `broken` is true are bad; `column` is shown in the examples."""

    reason: str
    column: str
    broken: pl.Expr


@dataclass(frozen=True)
class Cleaned:
    """Good rows of a table, what happened to the others, and what the run should say."""

    frame: pl.DataFrame
    report: TableReport
    notes: tuple[str, ...] = ()


def clean_events(
    table: Table,
    *,
    event_type: str,
    max_bad_rows: float,
    unit: TimeUnit = "auto",
    assume_utc: bool = False,
    any_type: bool = False,
) -> Cleaned:
    """Events in arrival order, from a table with the roles user, item and maybe time, event_type, value, order, keep.

    event_type: type of every event where the table has no such column. any_type: also those that the service's API
    would refuse; the log may hold them.
    Raises TooManyBadRowsError, and EmptySourceError if nothing is left.
    """
    _check_flat(table)
    frame, rules, left_out, notes = table.frame, [], {}, []
    if "keep" in frame.columns:
        kept = _boolean(frame, "keep")
        rules.append(Rule("keep is not true or false", "keep", kept.is_null()))
        before = frame.height
        frame = frame.filter(kept.fill_null(value=True))
        left_out["the keep column is false"] = before - frame.height
    frame = frame.with_columns(user_id=id_text(frame, "user"), item_id=id_text(frame, "item"))
    rules += [*_id_rules("user", "user_id"), *_id_rules("item", "item_id")]
    frame, time_rules, time_notes = _with_time(frame, "time", "timestamp", unit, assume_utc=assume_utc)
    rules += [Rule("no time", "time", pl.col("time").is_null()), *time_rules] if time_rules else []
    notes += time_notes
    frame = _with_type(frame, event_type)
    kind = pl.col("event_type")
    rules.append(Rule("no event type", "event_type", kind.is_null()))
    if not any_type:
        # What POST /events does not take, no user of the service would ever have in their history.
        strange = "event type is not 1 to 64 letters, digits and _ . : -"
        rules.append(Rule(strange, "event_type", ~kind.str.contains(EVENT_TYPE_PATTERN)))
    frame = frame.with_columns(number=_number(frame, "value"), rank=_rank(frame))
    if "value" in frame.columns:
        rules.append(Rule("value is not a number", "value", _present(frame, "value") & pl.col("number").is_null()))
    if "order" in frame.columns:
        rules.append(Rule("order is not a number", "order", pl.col("rank").is_null()))
    good, report = _apply(table, frame, rules, max_bad_rows, left_out)
    if good.is_empty():
        raise EmptySourceError(f"{table.name} holds no usable event ({report.rows_read:,} rows read)")
    if "order" in frame.columns:
        good, order_notes = _in_order(good)
        notes += order_notes
    events = good.select("user_id", "item_id", "event_type", pl.col("number").alias("value"), "timestamp")
    return Cleaned(events.cast(EVENTS_SCHEMA), report, tuple(notes))


def clean_items(
    table: Table,
    *,
    max_bad_rows: float,
    unit: TimeUnit = "auto",
    assume_utc: bool = False,
    separator: str = "|",
    several_rows: bool = False,
) -> Cleaned:
    """Items, from a table with the roles id and maybe title, available_from or year, available_until, withdrawn and
    category:<field>.

    separator: splits categories that are text. Of several rows with one id the first wins and the others are counted,
    but with `several_rows` each is kept: for tables that give one category a row.
    """
    _check_flat(table)
    frame = table.frame.with_columns(item_id=id_text(table.frame, "id"))
    rules, notes = _id_rules("id", "item_id", "item"), []
    for role, target in (("available_from", "starts"), ("available_until", "ends")):
        frame, time_rules, time_notes = _with_time(frame, role, target, unit, assume_utc=assume_utc)
        rules += time_rules
        notes += time_notes
    if "year" in frame.columns:
        frame = frame.with_columns(year_start(frame["year"]).alias("starts"))
        reason = f"year is not a whole number from {FIRST_YEAR} to {LAST_YEAR}"
        rules.append(Rule(reason, "year", _present(frame, "year") & pl.col("starts").is_null()))
    if "available_until" in frame.columns:
        closed = (pl.col("ends") <= pl.col("starts")).fill_null(value=False)
        rules.append(Rule("available_until is not after available_from", "available_until", closed))
    frame = frame.with_columns(gone=_boolean(frame, "withdrawn"))
    if "withdrawn" in frame.columns:
        rules.append(
            Rule("withdrawn is not true or false", "withdrawn", _present(frame, "withdrawn") & pl.col("gone").is_null())
        )
    good, report = _apply(table, frame, rules, max_bad_rows, {})
    items = good.select(
        "item_id",
        (pl.col("title") if "title" in good.columns else pl.lit(None)).cast(pl.String).alias("title"),
        _categories(good, separator).alias("categories"),
        pl.col("starts").alias("available_from"),
        pl.col("ends").alias("available_until"),
        pl.col("gone").fill_null(value=False).alias("withdrawn"),
    )
    unique = items if several_rows else items.unique("item_id", keep="first", maintain_order=True)
    report = leave_out(report, "the item was declared before", items.height - unique.height)
    return Cleaned(unique.cast(ITEMS_SCHEMA), report, tuple(notes))


def no_items() -> pl.DataFrame:
    """The items of a source that declares none."""
    return pl.DataFrame(schema=ITEMS_SCHEMA)


def filter_min_interactions(events: pl.DataFrame, users: int = 1, items: int = 1) -> pl.DataFrame:
    """Events of users with at least `users` events and items with at least `items`, in the same order.

    With both above 1 it repeats until both hold at once (a k-core): leaving out an item can bring a user below the
    minimum. Every event counts, repeated ones too.
    """
    while True:
        before = events.height
        if users > 1:
            events = events.filter(pl.len().over("user_id") >= users)
        if items > 1:
            events = events.filter(pl.len().over("item_id") >= items)
        if events.height == before:
            return events


def below_minimum(report: TableReport, dropped: int) -> TableReport:
    """The report after `min_interactions` took `dropped` events."""
    return leave_out(report, BELOW_MINIMUM, dropped)


def leave_out(report: TableReport, reason: str, rows: int) -> TableReport:
    """The report after `rows` kept so far were left out for `reason`."""
    if not rows:
        return report
    left_out = {**report.left_out, reason: rows}
    return TableReport(report.name, report.rows_read, report.rows_kept - rows, report.bad, left_out)


# Rules and their report


def _apply(
    table: Table, frame: pl.DataFrame, rules: Sequence[Rule], max_bad_rows: float, left_out: Mapping[str, int]
) -> tuple[pl.DataFrame, TableReport]:
    """Split off the bad rows; raise TooManyBadRowsError if their share is too large."""
    reason = pl.coalesce(pl.when(rule.broken).then(pl.lit(rule.reason)) for rule in rules)
    detail = pl.coalesce(pl.when(rule.broken).then(pl.col(rule.column).cast(pl.String, strict=False)) for rule in rules)
    frame = frame.with_columns(reason=reason)
    broken = frame.filter(pl.col("reason").is_not_null()).select("row", "reason", detail=detail)
    problems = pl.concat([table.problems, broken.cast(table.problems.schema)]).sort("row")
    good = frame.drop("reason")
    if broken.height:  # not always: it copies every column of every row
        good = good.filter(frame["reason"].is_null())
    counts = {reason: count for reason, count in left_out.items() if count}
    report = TableReport(table.name, table.rows_read, good.height, _bad_rows(table, problems), counts)
    _check_share(report, max_bad_rows)
    return good, report


def _bad_rows(table: Table, problems: pl.DataFrame) -> dict[str, BadRows]:
    bad = {}
    for (reason,), rows in problems.group_by("reason", maintain_order=True):
        examples = tuple(
            f"{table.name}:{table.place}{row}: {reason}" + (f" ({_short(detail)})" if detail is not None else "")
            for row, detail in rows.head(EXAMPLES).select("row", "detail").iter_rows()
        )
        bad[str(reason)] = BadRows(rows.height, examples)
    return bad


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_EXAMPLE else text[: LONGEST_EXAMPLE - 3] + "..."


def _check_share(report: TableReport, max_bad_rows: float) -> None:
    if not report.rows_bad or report.rows_bad <= max_bad_rows * report.rows_read:
        return
    examples = "\n".join(f"  {example}" for rows in report.bad.values() for example in rows.examples)
    raise TooManyBadRowsError(
        f"{report.name}: {report.rows_bad:,} of {report.rows_read:,} rows are bad, more than max_bad_rows "
        f"({max_bad_rows:g}) allows; correct the file or the mapping, or raise data.source.max_bad_rows:\n{examples}"
    )


# Columns


def _check_flat(table: Table) -> None:
    """Numbers, text, times and booleans pass; only categories may be lists, and only of those."""
    for column, dtype in table.frame.schema.items():
        inner = dtype.inner if isinstance(dtype, pl.List) and column.startswith(CATEGORY) else dtype
        if isinstance(inner, pl.DataType) and (inner.is_nested() or inner == pl.Binary):
            raise InvalidSourceError(f"{table.name}: the column mapped to {column} holds {dtype}; map a plain column")


def _id_rules(column: str, target: str, noun: str | None = None) -> list[Rule]:
    noun = noun or column
    return [
        Rule(f"no {noun} id", column, pl.col(column).is_null()),
        Rule(f"bad {noun} id", column, pl.col(target).is_null()),
    ]


def _with_time(
    frame: pl.DataFrame, column: str, target: str, unit: TimeUnit, *, assume_utc: bool
) -> tuple[pl.DataFrame, list[Rule], list[str]]:
    """Add `target`, microseconds; null everywhere, and no rules, if the table has no such column."""
    if column not in frame.columns:
        return frame.with_columns(pl.lit(None, pl.Int64).alias(target)), [], []
    times = read_times(frame[column], unit, assume_utc=assume_utc)
    naive = f"{target}_naive"
    frame = frame.with_columns(times.micros.alias(target), times.naive.alias(naive))
    unreadable = pl.col(column).is_not_null() & pl.col(target).is_null()
    rules = [
        Rule(f"{column} has no offset: add one, or set assume_utc: true to read it as UTC", column, pl.col(naive)),
        Rule(f"unreadable {column}", column, unreadable),
    ]
    guessed = times.unit if unit == "auto" else None
    notes = [f"{column}: numbers are read as {UNIT_NAMES[guessed]} since 1970 (time_unit sets it)"] if guessed else []
    return frame, rules, notes


def _with_type(frame: pl.DataFrame, event_type: str) -> pl.DataFrame:
    if "event_type" not in frame.columns:
        return frame.with_columns(pl.lit(event_type).alias("event_type"))
    text = pl.col("event_type").cast(pl.String, strict=False).str.strip_chars().replace("", None)
    return frame.with_columns(text.alias("event_type"))


def _number(frame: pl.DataFrame, column: str) -> pl.Expr:
    """f64, null where there is no finite number (or no such column)."""
    if column not in frame.columns:
        return pl.lit(None, pl.Float64)
    number = pl.col(column).cast(pl.Float64, strict=False)
    return pl.when(number.is_finite()).then(number)


def _rank(frame: pl.DataFrame) -> pl.Expr:
    """The order column, exact where it is whole: sequence numbers can be larger than a float holds."""
    if "order" in frame.columns and frame.schema["order"].is_integer():
        return pl.col("order")
    return _number(frame, "order")


def _present(frame: pl.DataFrame, column: str) -> pl.Expr:
    """True where there is a value: NaN stands for a gap in files that come from pandas."""
    there = pl.col(column).is_not_null()
    return there & pl.col(column).is_not_nan() if frame.schema[column].is_float() else there


def _boolean(frame: pl.DataFrame, column: str) -> pl.Expr:
    """True, false, or null for anything else (or if there is no such column)."""
    if column not in frame.columns:
        return pl.lit(None, pl.Boolean)
    if frame.schema[column] == pl.Boolean:
        return pl.col(column)
    text = pl.col(column).cast(pl.String, strict=False).str.strip_chars().str.to_lowercase()
    return pl.when(text.is_in(TRUE_TEXTS)).then(statement=True).when(text.is_in(FALSE_TEXTS)).then(statement=False)


def _categories(frame: pl.DataFrame, separator: str) -> pl.Expr:
    """One list of "field:value" a row, in the order of the mapping, each once."""
    columns = [column for column in frame.columns if column.startswith(CATEGORY)]
    if not columns:
        return pl.lit([], pl.List(pl.String))
    lists = [_category_list(frame, column, separator) for column in columns]
    return pl.concat_list(lists).list.unique(maintain_order=True)


def _category_list(frame: pl.DataFrame, column: str, separator: str) -> pl.Expr:
    dtype, raw = frame.schema[column], pl.col(column)
    values = raw if isinstance(dtype, pl.List) else raw.cast(pl.String, strict=False).str.split(separator)
    text = pl.element().cast(pl.String, strict=False).str.strip_chars()
    name = column.removeprefix(CATEGORY)
    named = pl.lit(f"{name}:" if name else "") + text.filter(text.str.len_bytes() > 0)
    return values.list.eval(named).fill_null(pl.lit([], pl.List(pl.String)))


def _in_order(events: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Sort the events of each user by `rank`, users by their first row. Where times contradict it, the order wins.

    Histories are sorted by (user, time, arrival), so an event that comes later in order and earlier in time would
    move; it gets the time of the event before it instead, and is counted.
    """
    first = pl.col("row").min().over("user_id")
    events = events.with_columns(first=first).sort("first", "rank", maintain_order=True)
    # A running maximum of nulls is null, so events without times pass unchanged.
    late = events.with_columns(raised=pl.col("timestamp").cum_max().over("user_id"))
    moved = late.filter(pl.col("raised") > pl.col("timestamp"))
    if moved.is_empty():
        return events, []
    users, shift = moved["user_id"].n_unique(), (moved["raised"] - moved["timestamp"]).max()
    seconds = shift / 1_000_000 if isinstance(shift, int) else 0.0
    note = (
        f"order contradicts the times of {users:,} users: {moved.height:,} events were given the time of the event "
        f"before them (at most {seconds:,.0f} s later)"
    )
    return late.with_columns(pl.col("raised").alias("timestamp")), [note]
