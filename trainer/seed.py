"""Load a source's events and items into the service's log and catalogue, before the service starts or beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Final

import polars as pl
from sqlalchemy import JSON, Table, Text, and_, cast, delete, func, literal, or_, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared import times
from shared.database import (
    cache_outbox,
    catalogue_revision,
    check_schema,
    create_engine,
    erasures,
    events,
    items,
    migrate,
)
from shared.erasure import Tombstones, pseudonym, read_tombstones
from trainer.sources import RawData, UnavailableError
from trainer.sources.erased import without_erased

CHUNK: Final = 2_000
LOADED: Final = "loaded"
"""What stands in the digest of a loaded event: nobody sent it, so no retry can be equal to it."""


async def seed_log(raw: RawData, url: str, say: Callable[[str], None]) -> int:
    """Write what is not there yet, in arrival order; how many events were new.

    An event's id is a hash of its content, and a number where equal events repeat: a second load, or a longer export
    of the same table, stores nothing twice. Items of an earlier load are brought up to date; what a call to the service
    set stays. A running service reads the users anew within seconds. Raises UnavailableError, which shows no password.
    """
    try:
        engine = create_engine(url)
    except ArgumentError:
        raise UnavailableError(
            "the log's URL is none; write sqlite:///file.db or postgresql://user:password@host/name"
        ) from None
    try:
        await migrate(engine)
        await check_schema(engine)
        await _seed_items(engine, raw)
        started = times.now() - 60 * times.SECOND  # clocks differ
        async with engine.connect() as connection:
            tombstones = await read_tombstones(connection) or Tombstones(b"")
        return await _seed_events(engine, without_erased(raw, tombstones), tombstones.key, started, say)
    except (SQLAlchemyError, OSError) as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise UnavailableError(f"the log {shown} cannot be written: {str(error).partition(chr(10))[0]}") from None
    finally:
        await engine.dispose()


def _insert(engine: AsyncEngine, table: Table) -> Any:
    """An insert of either dialect that knows ON CONFLICT."""
    return sqlite_insert(table) if engine.dialect.name == "sqlite" else postgresql_insert(table)


async def _seed_items(engine: AsyncEngine, raw: RawData) -> None:
    if raw.items.is_empty():
        return
    insert = _insert(engine, items)
    changed = {c.name: insert.excluded[c.name] for c in items.c if c.name != "item_id"}
    # What is as it was keeps its revision: workers fetch what has a new one.
    told = [c for c in items.c if c.name not in ("item_id", "revision", "loaded")]
    other = or_(*(_text(c).is_distinct_from(_text(insert.excluded[c.name])) for c in told))
    where = and_(items.c.loaded, other)
    upsert = insert.on_conflict_do_update(index_elements=[items.c.item_id], set_=changed, where=where)
    async with engine.begin() as connection:
        # One revision for the whole load; taking it first makes other catalogue writers wait.
        bumped = update(catalogue_revision).values(revision=catalogue_revision.c.revision + 1)
        revision = (await connection.execute(bumped.returning(catalogue_revision.c.revision))).scalar_one()
        rows = [{**row, "revision": revision, "loaded": True} for row in raw.items.iter_rows(named=True)]
        for start in range(0, len(rows), CHUNK):
            await connection.execute(upsert, rows[start : start + CHUNK])


def _text(column: Any) -> Any:
    """What tells two values of a column apart: PostgreSQL compares no JSON."""
    return cast(column, Text) if isinstance(column.type, JSON) else column


async def _seed_events(engine: AsyncEngine, raw: RawData, key: bytes, started: int, say: Callable[[str], None]) -> int:
    insert, new = _insert(engine, events).on_conflict_do_nothing(), 0
    for done, rows in _event_chunks(raw):
        async with engine.begin() as connection:
            before = (await connection.execute(select(func.max(events.c.seq)))).scalar_one() or 0
            await connection.execute(insert, rows)
            await _take_back(connection, before, key, started)
            loaded = (events.c.seq > before, events.c.digest == LOADED)
            new += (await connection.execute(select(func.count()).where(*loaded))).scalar_one()
            # Entries of these users in the history cache lack the events: the service's sweep drops them.
            newest = select(func.max(events.c.seq), events.c.user_id, literal(0)).where(*loaded)
            marks = newest.group_by(events.c.user_id)
            await connection.execute(cache_outbox.insert().from_select(["seq", "user_id", "written"], marks))
        if done % 100_000 < CHUNK:
            say(f"  {done:,} of {raw.events.height:,} events")
    return new


async def _take_back(connection: AsyncConnection, before: int, key: bytes, started: int) -> None:
    """Delete rows after `before` of users who were erased since the load began: they wait for us, or we for them."""
    fresh = select(erasures.c.user_hash, erasures.c.erased_at).where(erasures.c.erased_at >= started)
    if not (erased := {row.user_hash: row.erased_at for row in await connection.execute(fresh)}):
        return
    loaded = (events.c.seq > before, events.c.digest == LOADED)
    for user in (await connection.execute(select(events.c.user_id).where(*loaded).distinct())).scalars().all():
        if (at := erased.get(pseudonym(key, user))) is not None:
            gone = (*loaded, events.c.user_id == user, events.c.timestamp <= at)
            await connection.execute(delete(events).where(*gone))


def _event_chunks(raw: RawData) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of the table `events`, with how many were given out so far."""
    content = ["user_id", "item_id", "event_type", "value", "timestamp"]
    frame = raw.events.with_columns(repeat=pl.int_range(pl.len()).over(content))
    for start in range(0, frame.height, CHUNK):
        rows = [
            {
                "event_id": _event_id(row),
                **{name: row[name] for name in content},
                # Without times the place in the file: an order, far below any time that events have.
                "timestamp": start + r if row["timestamp"] is None else row["timestamp"],
                "recommendation_id": None,
                "session_id": None,
                "digest": LOADED,
            }
            for r, row in enumerate(frame.slice(start, CHUNK).iter_rows(named=True))
        ]
        yield start + len(rows), rows


def _event_id(row: dict[str, Any]) -> str:
    text = json.dumps([row[name] for name in ("user_id", "item_id", "event_type", "value", "timestamp")])
    return f"load-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}-{row['repeat']}"
