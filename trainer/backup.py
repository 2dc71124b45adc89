"""Backup and restore of the log and the catalogue, as Parquet, between any two databases that Upnext runs on.

    DIR/manifest.json          when, what, and size and checksum of each file
    DIR/events-00001.parquet   the log in the order of arrival, 100,000 events a file
    DIR/items.parquet          the live catalogue
    DIR/tombstones.json        who was erased, as `python -m service tombstones` prints it

A backup is one moment: what is written meanwhile is in it as a whole or not at all. It holds users' events: keep it as
safe as the database. A restore goes into an empty log, all or nothing, without what a tombstone covers: one of the
backup, of the database, or of a file written since. At its end stands a row of the outbox that makes the service forget
all cached histories.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import polars as pl
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import ColumnElement, Table, delete, func, insert, select, text, update
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from shared import times
from shared.database import (
    EVERYBODY,
    SchemaError,
    cache_outbox,
    catalogue_revision,
    check_schema,
    create_engine,
    erasure_key,
    erasures,
    events,
    items,
    migrate,
    normalise,
)
from shared.erasure import Tombstones, TombstonesError, read_tombstones
from shared.files import move_durably
from trainer.errors import TrainerError

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
ITEMS: Final = "items.parquet"
TOMBSTONES: Final = "tombstones.json"
ROWS: Final = 100_000
"""Events in one file, and in memory at a time."""
_CHUNK: Final = 1_000  # rows in one statement
_TYPES: Final = {"seq": pl.Int64(), "value": pl.Float64(), "timestamp": pl.Int64()}
EVENTS_SCHEMA: Final = pl.Schema({column.name: _TYPES.get(column.name, pl.String()) for column in events.c})
ITEMS_SCHEMA: Final = pl.Schema(
    {
        "item_id": pl.String(),
        "title": pl.String(),
        "categories": pl.List(pl.String()),
        "available_from": pl.Int64(),
        "available_until": pl.Int64(),
        "withdrawn": pl.Boolean(),
        "revision": pl.Int64(),
        "loaded": pl.Boolean(),
    }
)
Say = Callable[[str], None]


class BackupError(TrainerError):
    """A backup that cannot be written, or must not be restored."""


class FileEntry(BaseModel):
    """One file of a backup."""

    model_config = ConfigDict(extra="forbid")

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(BaseModel):
    """`manifest.json`."""

    model_config = ConfigDict(extra="ignore")  # a later release may add fields

    format: int
    created: str
    events: int = Field(ge=0)
    items: int = Field(ge=0)
    last_seq: int
    catalogue_revision: int
    files: dict[str, FileEntry]

    def event_files(self) -> list[str]:
        """In the order of arrival."""
        return sorted(name for name in self.files if name.startswith("events-"))


# --- backup -------------------------------------------------------------------------------------------


async def backup(url: str, folder: Path, say: Say, *, rows: int = ROWS) -> Manifest:
    """Write a backup of the database to `folder`, which must not exist yet. Raises BackupError and SchemaError."""
    _check_source(url, folder)
    async with _engine(url) as engine, _snapshot(engine) as connection:
        await check_schema(engine)
        with _aside(folder) as staging:
            manifest = await _write(connection, staging, say, rows)
            (staging / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    say(f"{folder}: {manifest.events:,} events, {manifest.items:,} items")
    return manifest


def _check_source(url: str, folder: Path) -> None:
    if folder.exists():
        raise BackupError(f"{folder} exists already; a backup goes into a folder of its own")
    parsed = _parsed(url)
    # SQLite would make a missing file.
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        raise BackupError(f"there is no database file {parsed.database}")


def _parsed(url: str) -> URL:
    try:
        return normalise(url)
    except (ArgumentError, SchemaError):
        form = "sqlite:///file.db or postgresql://user:password@host/name"
        raise BackupError(f"the log's URL is none; write {form}") from None


@asynccontextmanager
async def _snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A connection that sees one moment of the database, however long it reads."""
    async with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            await connection.exec_driver_sql("BEGIN")
        else:
            await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        yield connection


async def _write(connection: AsyncConnection, staging: Path, say: Say, rows: int) -> Manifest:
    found = (await connection.execute(select(func.count(), func.max(events.c.seq)).select_from(events))).one()
    revision = (await connection.execute(select(catalogue_revision.c.revision))).scalar_one()
    written, number = 0, 0
    async for frame in _pages(connection, events, events.c.seq, EVENTS_SCHEMA, rows):
        number += 1
        frame.write_parquet(staging / f"events-{number:05d}.parquet")
        written += frame.height
        say(f"  {written:,} of {found[0]:,} events")
    catalogue = [f async for f in _pages(connection, items, items.c.item_id, ITEMS_SCHEMA, rows)]
    table = pl.concat([pl.DataFrame(schema=ITEMS_SCHEMA), *catalogue])
    table.write_parquet(staging / ITEMS)
    tombstones = await read_tombstones(connection)
    if tombstones is not None:
        (staging / TOMBSTONES).write_text(tombstones.to_json())
    return Manifest(
        format=FORMAT,
        created=times.render(times.now()),
        events=written,
        items=table.height,
        last_seq=found[1] or 0,
        catalogue_revision=revision,
        files=_entries(staging),
    )


async def _pages(
    connection: AsyncConnection, table: Table, key: ColumnElement[Any], schema: pl.Schema, rows: int
) -> AsyncIterator[pl.DataFrame]:
    """The table in the order of `key`, in frames that each start after the last row of the one before."""
    columns = [table.c[name] for name in schema]
    page = select(*columns).order_by(key).limit(rows)
    frame = pl.DataFrame(await _rows(connection, page), schema=schema, orient="row")
    while frame.height:
        yield frame
        after = frame[key.name].last()
        frame = pl.DataFrame(await _rows(connection, page.where(key > after)), schema=schema, orient="row")


async def _rows(connection: AsyncConnection, query: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await connection.execute(query)]


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A folder for its owner alone, renamed to `folder` when it is complete, else removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    staging.mkdir(mode=0o700)
    try:
        yield staging
        move_durably(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --- restore ------------------------------------------------------------------------------------------


async def restore(url: str, folder: Path, say: Say, *, tombstones: Path | None = None) -> int:
    """Put a backup into an empty database; how many events it now holds. `tombstones`: a file written since.

    Raises BackupError; nothing was written then.
    """
    manifest = verified(folder)
    try:
        known = Tombstones.of_file(folder / TOMBSTONES) if TOMBSTONES in manifest.files else Tombstones(b"")
        known = known.merged(Tombstones.of_file(tombstones)) if tombstones is not None else known
        async with _engine(url) as engine:
            await migrate(engine)
            async with engine.begin() as connection:
                return await _restore(connection, folder, manifest, known, say)
    except TombstonesError as error:
        raise BackupError(str(error)) from error


async def _restore(connection: AsyncConnection, folder: Path, manifest: Manifest, known: Tombstones, say: Say) -> int:
    on_postgresql = connection.dialect.name == "postgresql"
    if on_postgresql:
        await connection.execute(text("LOCK TABLE events, items IN SHARE ROW EXCLUSIVE MODE"))
    # The first write: from here on SQLite has no other writer.
    await connection.execute(delete(cache_outbox))
    for table in (events, items):
        if (await connection.execute(select(func.count()).select_from(table))).scalar_one():
            raise BackupError(f"the table {table.name} is not empty; restore into a fresh database")
    known = await _keep_tombstones(connection, known)
    kept = 0
    for name in manifest.event_files():
        frame = _without_erased(pl.read_parquet(folder / name), known)
        await _insert(connection, events, frame)
        kept += frame.height
        say(f"  {kept:,} of {manifest.events:,} events")
    catalogue = pl.read_parquet(folder / ITEMS)
    await _insert(connection, items, catalogue.filter(pl.col("categories").is_not_null()))
    # Left out, a JSON column becomes NULL; given None, it becomes the JSON text null.
    await _insert(connection, items, catalogue.filter(pl.col("categories").is_null()).drop("categories"))
    await connection.execute(update(catalogue_revision).values(revision=manifest.catalogue_revision))
    await connection.execute(insert(cache_outbox), [{"seq": -1, "user_id": EVERYBODY, "written": 0}])
    if on_postgresql and manifest.last_seq:
        moved = text("SELECT setval(pg_get_serial_sequence('events', 'seq'), :last)")
        await connection.execute(moved, {"last": manifest.last_seq})
    say(f"{folder}: {kept:,} events restored, {manifest.events - kept:,} of erased users left out")
    return kept


async def _keep_tombstones(connection: AsyncConnection, known: Tombstones) -> Tombstones:
    """Those of the database and `known` together, stored in the database."""
    there = await read_tombstones(connection)
    merged = known if there is None else there.merged(known) if known.erased else there
    if known.key and not (there and there.erased):
        merged = known  # a fresh database takes over the key, so that both can be merged once more
        await connection.execute(update(erasure_key).values(key=known.key.hex()))
    await connection.execute(delete(erasures))
    rows = {"user_hash": list(merged.erased), "erased_at": list(merged.erased.values())}
    await _insert(connection, erasures, pl.DataFrame(rows))
    return merged


def _without_erased(frame: pl.DataFrame, tombstones: Tombstones) -> pl.DataFrame:
    users = frame["user_id"].unique().to_list()
    erased = {user: at for user in users if (at := tombstones.erased_at(user)) is not None}
    if not erased:
        return frame
    until = pl.col("user_id").replace_strict(erased, default=None, return_dtype=pl.Int64)
    return frame.filter(until.is_null() | (pl.col("timestamp") > until))


async def _insert(connection: AsyncConnection, table: Table, frame: pl.DataFrame) -> None:
    for part in frame.iter_slices(_CHUNK):
        if part.height:
            await connection.execute(insert(table), part.rows(named=True))


def verified(folder: Path) -> Manifest:
    """The manifest of a backup whose files are all as they were written. Raises BackupError."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError as error:
        raise BackupError(f"{folder} holds no backup: {MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        raise BackupError(f"{folder / MANIFEST} is not the manifest of a backup") from error
    if manifest.format != FORMAT:
        raise BackupError(f"{folder} has format {manifest.format}; this release reads {FORMAT}")
    for name, entry in manifest.files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file() or _entry(file) != entry:
            raise BackupError(f"{file} is missing, or not as it was written")
    for name, wanted in [(ITEMS, ITEMS_SCHEMA), *((name, EVENTS_SCHEMA) for name in manifest.event_files())]:
        if name not in manifest.files or _schema(folder / name) != wanted:
            raise BackupError(f"{folder / name} is missing, or no table of the columns {', '.join(wanted)}")
    return manifest


def _schema(file: Path) -> pl.Schema | None:
    try:
        return pl.read_parquet_schema(file)  # type: ignore[return-value]
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError):
        return None


def _entries(folder: Path) -> dict[str, FileEntry]:
    return {file.name: _entry(file) for file in sorted(folder.iterdir())}


def _entry(file: Path) -> FileEntry:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return FileEntry(size=file.stat().st_size, sha256=digest)


@asynccontextmanager
async def _engine(url: str) -> AsyncIterator[AsyncEngine]:
    """An engine whose failures are BackupErrors that show no password."""
    _parsed(url)
    engine = create_engine(url)
    try:
        yield engine
    except (SQLAlchemyError, OSError) as error:
        shown = engine.url.render_as_string(hide_password=True)
        raise BackupError(f"the database {shown}: {str(error).partition(chr(10))[0]}") from None
    finally:
        await engine.dispose()
