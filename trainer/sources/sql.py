"""The service's own event log and catalogue, read from SQL in the order of arrival."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import polars as pl
from sqlalchemy import Select, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from shared import database, times
from shared.erasure import Tombstones, TombstonesError, read_tombstones
from trainer.sources.clean import CATEGORY, clean_events, clean_items
from trainer.sources.config import SqlSource
from trainer.sources.erased import without_erased
from trainer.sources.errors import InvalidSourceError, MissingFileError, UnavailableError
from trainer.sources.report import EVENTS_SCHEMA, NO_TIMES, RawData, SourceReport
from trainer.sources.tables import Table

LOG, CATALOGUE = database.events.c, database.items.c
LOG_SCHEMA = pl.Schema({"row": pl.Int64(), **EVENTS_SCHEMA})
CATALOGUE_SCHEMA = pl.Schema(
    {
        "id": pl.String(),
        "title": pl.String(),
        CATEGORY: pl.List(pl.String()),
        "available_from": pl.Int64(),
        "available_until": pl.Int64(),
        "withdrawn": pl.Boolean(),
    }
)


def load_sql(config: SqlSource) -> RawData:
    """Everything in the log and the catalogue at this moment.

    Raises UnavailableError if the database cannot be read. A URL is never shown with its password.
    """
    url = _parse(config.url.get_secret_value())
    shown = url.set(query={}).render_as_string(hide_password=True)  # a query can hold a password too
    try:
        log, catalogue, tombstones = asyncio.run(_read(url, config.chunk_rows))
    except (SQLAlchemyError, OSError, TombstonesError) as error:
        reason = str(error).partition("\n")[0]
        for secret in (url.password, url.query.get("password")):
            reason = reason.replace(str(secret), "***") if secret else reason
        # The original is not chained: a driver may repeat the URL in its own words.
        raise UnavailableError(
            f"the database {shown} cannot be read: {reason}; check data.source.url, and that its schema is there "
            "(python -m service migrate)"
        ) from None
    events = clean_events(log, event_type="", max_bad_rows=config.max_bad_rows, unit="us", any_type=True)
    items = clean_items(catalogue, max_bad_rows=config.max_bad_rows, unit="us")
    report = SourceReport(events.report, (items.report,), (*events.notes, *items.notes))
    newest = events.frame["timestamp"].max()
    has_times = isinstance(newest, int) and newest >= times.UNDATED
    if has_times:
        return without_erased(RawData(shown, events.frame, items.frame, report, has_times=True), tombstones)
    # Loaded from files without times, and nothing has come since: the order of the log is all there is.
    timeless = events.frame.with_columns(timestamp=pl.lit(None, pl.Int64))
    report = replace(report, notes=(*report.notes, NO_TIMES))
    return without_erased(RawData(shown, timeless, items.frame, report, has_times=False), tombstones)


def _parse(url: str) -> URL:
    try:
        parsed = database.normalise(url)
    except (ArgumentError, database.SchemaError):
        raise InvalidSourceError(
            "data.source.url is no database that Upnext reads; write sqlite:///file.db or "
            "postgresql://user:password@host/name"
        ) from None
    # SQLite would make a missing file, and the run would then complain of missing tables.
    if parsed.get_backend_name() == "sqlite" and parsed.database and not Path(parsed.database).is_file():
        raise MissingFileError(Path(parsed.database), "database file")
    return parsed


async def _read(url: URL, chunk_rows: int) -> tuple[Table, Table, Tombstones]:
    engine = database.plain_engine(url)
    try:
        async with engine.connect() as connection:
            log, catalogue = await _read_log(connection, chunk_rows), await _read_catalogue(connection)
            # Last: who is erased while the log is read is left out too.
            return log, catalogue, await read_tombstones(connection) or Tombstones(b"")
    finally:
        await engine.dispose()


async def _read_log(connection: AsyncConnection, chunk_rows: int) -> Table:
    """The log by seq, in chunks that each start after the last seq read. Events accepted meanwhile are left."""
    newest = (await connection.execute(select(func.max(LOG.seq)))).scalar()
    chunks, after, more = [pl.DataFrame(schema=LOG_SCHEMA)], None, newest is not None
    while more:
        chunk = await _fetch(connection, _log_page(after, newest, chunk_rows), LOG_SCHEMA)
        chunks.append(chunk)
        after, more = chunk["row"].max(), chunk.height == chunk_rows
    roles = {"user_id": "user", "item_id": "item", "timestamp": "time"}
    return Table("events", pl.concat(chunks).rename(roles), place="seq ")


def _log_page(after: object, newest: int, rows: int) -> Select[tuple[object, ...]]:
    columns = (LOG.seq, LOG.user_id, LOG.item_id, LOG.event_type, LOG.value, LOG.timestamp)
    page = select(*columns).where(LOG.seq <= newest).order_by(LOG.seq).limit(rows)
    return page if after is None else page.where(LOG.seq > after)


async def _read_catalogue(connection: AsyncConnection) -> Table:
    columns = (
        CATALOGUE.item_id, CATALOGUE.title, CATALOGUE.categories,
        CATALOGUE.available_from, CATALOGUE.available_until, CATALOGUE.withdrawn,
    )  # fmt: skip
    frame = await _fetch(connection, select(*columns).order_by(CATALOGUE.item_id), CATALOGUE_SCHEMA)
    return Table("items", frame.with_row_index("row", offset=1), place="row ")


async def _fetch(connection: AsyncConnection, query: Select[tuple[object, ...]], schema: pl.Schema) -> pl.DataFrame:
    rows = [tuple(row) for row in await connection.execute(query)]
    return pl.DataFrame(rows, schema=schema, orient="row")
