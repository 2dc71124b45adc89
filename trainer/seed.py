"""Load a source's events and items into the service's log and catalogue, before the service starts or beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlalchemy import Insert, Table, func, select, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared.database import catalogue_revision, check_schema, create_engine, events, items, migrate
from trainer.sources import RawData, UnavailableError

CHUNK: Final = 2_000


async def seed_log(raw: RawData, url: str, say: Callable[[str], None]) -> int:
    """Write what is not there yet, in arrival order; how many events were new.

    An event's id is its source and row number, so a second load finds the first one's events. Items that the
    catalogue has already keep what it says. A service that runs meanwhile sees new users at once; users it has in its
    cache are read anew when their entry expires. Raises UnavailableError, which shows no password.
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
        return await _seed_events(engine, raw, say)
    except (SQLAlchemyError, OSError) as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise UnavailableError(f"the log {shown} cannot be written: {str(error).partition(chr(10))[0]}") from None
    finally:
        await engine.dispose()


def _insert(engine: AsyncEngine, table: Table) -> Insert:
    """An insert that passes over rows which are there, in either dialect."""
    if engine.dialect.name == "sqlite":
        return sqlite_insert(table).on_conflict_do_nothing()
    return postgresql_insert(table).on_conflict_do_nothing()


async def _count(connection: AsyncConnection, table: Table) -> int:
    return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


async def _seed_items(engine: AsyncEngine, raw: RawData) -> None:
    async with engine.begin() as connection:
        # One revision for the whole load; taking it first makes other catalogue writers wait.
        bumped = update(catalogue_revision).values(revision=catalogue_revision.c.revision + 1)
        revision = (await connection.execute(bumped.returning(catalogue_revision.c.revision))).scalar_one()
        rows = [{**row, "revision": revision} for row in raw.items.iter_rows(named=True)]
        for start in range(0, len(rows), CHUNK):
            await connection.execute(_insert(engine, items), rows[start : start + CHUNK])


async def _seed_events(engine: AsyncEngine, raw: RawData, say: Callable[[str], None]) -> int:
    new = 0
    for done, rows in _event_chunks(raw):
        async with engine.begin() as connection:
            before = await _count(connection, events)
            await connection.execute(_insert(engine, events), rows)
            new += await _count(connection, events) - before
        if done % 100_000 < CHUNK:
            say(f"  {done:,} of {raw.events.height:,} events")
        await asyncio.sleep(0)
    return new


def _event_chunks(raw: RawData) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Rows of the table `events`, with how many were given out so far."""
    frame = raw.events
    for start in range(0, frame.height, CHUNK):
        rows = [
            {
                "event_id": f"{raw.name}-{start + r}",
                "user_id": row["user_id"],
                "item_id": row["item_id"],
                "event_type": row["event_type"],
                "value": row["value"],
                "timestamp": start + r if row["timestamp"] is None else row["timestamp"],
                "recommendation_id": None,
                "session_id": None,
                "digest": "loaded",
            }
            for r, row in enumerate(frame.slice(start, CHUNK).iter_rows(named=True))
        ]
        yield start + len(rows), rows
