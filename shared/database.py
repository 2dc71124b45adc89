"""The SQL tables that service and trainer both use: the event log and the live catalogue.

Times are epoch microseconds in BIGINT: SQLAlchemy's timezone-aware DateTime loses the offset on SQLite.
The schema changes by Alembic revisions alone (`shared/migrations`), applied by `python -m service migrate`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Final
from urllib.parse import urlencode

import aiosqlite
from aiosqlite.core import _connection_worker_thread
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    make_url,
)  # fmt: skip
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

log = logging.getLogger(__name__)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only for a column declared INTEGER PRIMARY KEY.
Sequence64 = BigInteger().with_variant(Integer, "sqlite")

events = Table(
    "events",
    metadata,
    Column("seq", Sequence64, primary_key=True, autoincrement=True, comment="arrival: the log's own order"),
    Column("event_id", String(256), nullable=False),
    Column("user_id", String(256), nullable=False),
    Column("item_id", String(256), nullable=False),
    Column("event_type", String(64), nullable=False),
    Column("value", Float(53)),
    Column("timestamp", BigInteger, nullable=False, comment="epoch microseconds"),
    Column("recommendation_id", String(256)),
    Column("session_id", String(256)),
    Column("digest", String(32), nullable=False, comment="hash of the fields as sent: tells a retry from a conflict"),
    UniqueConstraint("user_id", "event_id"),
    Index(None, "user_id", "timestamp", "seq"),
    sqlite_autoincrement=True,  # a number is never used twice, even after the newest row was erased
)

items = Table(
    "items",
    metadata,
    Column("item_id", String(256), primary_key=True),
    Column("title", Text),
    Column("categories", JSON, comment='list of "field:value"; null leaves what the bundle says'),
    Column("available_from", BigInteger, comment="epoch microseconds; null leaves what the bundle says"),
    Column("available_until", BigInteger),
    Column("withdrawn", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False, comment="of the whole catalogue, at this item's last change"),
    Column(
        "loaded",
        Boolean,
        nullable=False,
        server_default=false(),
        comment="from a file, not by a call: gives way to the bundle",
    ),
    Index(None, "revision"),
)

catalogue_revision = Table(
    "catalogue_revision",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False, comment="one row; changing it orders all catalogue changes"),
)

cache_outbox = Table(
    "cache_outbox",
    metadata,
    Column("seq", Sequence64, primary_key=True, autoincrement=False),
    Column("user_id", String(256), nullable=False),
    Column("written", BigInteger, nullable=False, comment="epoch microseconds"),
    comment="events that may not have reached the history cache yet; a row goes when its event has",
)

EVERYBODY: Final = ""
"""In place of a user in `cache_outbox`: all cached histories are to be dropped. No user has this id."""

LATE: Final = -(2**53)
"""Rows of `cache_outbox` with smaller numbers are for the last drop of an entry after its user was erased."""

erasures = Table(
    "erasures",
    metadata,
    Column("user_hash", String(64), primary_key=True, comment="HMAC-SHA256 of the user id, in hex"),
    Column("erased_at", BigInteger, nullable=False, comment="epoch microseconds; the user's events up to it are gone"),
)

erased_events = Table(
    "erased_events",
    metadata,
    Column("event_hash", String(64), primary_key=True, comment="HMAC-SHA256 of user id and event id, in hex"),
    Column("erased_at", BigInteger, nullable=False, comment="epoch microseconds"),
    comment="events that were a day old at most when their user was erased: a retry without a time is known by it",
)

erasure_key = Table(
    "erasure_key",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("key", String(64), nullable=False, comment="one row; 256 bits in hex"),
)


CLOSE_SECONDS: Final = 1.0
"""A PostgreSQL that takes longer to say goodbye, or for what is under way when the service stops, is left without."""
_PASSING_STATES: Final = ("08", "25006", "40", "53", "55P03", "57P01", "57P02", "57P03", "57P05")
"""PostgreSQL: a connection that broke, a standby, a deadlock, no room (for connections, on the disk), a lock, a server
that stops or starts."""
_PASSING_NAMES: Final = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL")


class SchemaError(Exception):
    """A database whose schema does not fit this release."""


def normalise(url: str) -> URL:
    """A SQLAlchemy URL with the async driver Upnext uses: `sqlite:///x.db`, `postgresql://host/db`."""
    parsed = make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
    family = parsed.drivername.split("+")[0]
    if family not in drivers:
        raise SchemaError(f"database family {family!r} is not supported; use sqlite:///file or postgresql://host/name")
    return parsed.set(drivername=drivers[family])


def plain_engine(url: URL, **options: Any) -> AsyncEngine:
    """An async engine for what `normalise` gave. Errors of its statements show no values: they are users' data.

    PostgreSQL's own words for TLS (`sslmode=verify-full`, `sslrootcert`, `sslcert`, `sslkey`, ...) may stand in the
    query of the URL, as in any other of its clients; asyncpg reads them from a DSN alone.
    """
    tls = {name: value for name, value in url.query.items() if name.startswith("ssl")}
    if tls:
        url = url.difference_update_query(tls)
        options["connect_args"] = {**options.get("connect_args", {}), "dsn": f"postgresql://?{urlencode(tls)}"}
    return create_async_engine(url, hide_parameters=True, **options)


READER_KIB: Final = 64
WRITER_KIB: Final = 2_000
"""Of pages that a connection to SQLite keeps. The system has the file's pages in memory anyway, so that a connection
which reads needs few (a user's events out of 600,000 took 163 us with 512 KiB and 165 to 175 us with less), and a
worker has a dozen, some of which are used once in an hour. One which writes many rows at a time would write the same
page again and again."""


def create_engine(
    url: str, *, sqlite_kib: int = WRITER_KIB, statement_seconds: float | None = None, **options: Any
) -> AsyncEngine:
    """An async engine for `url`; SQLite is set up by `prepare_sqlite`, with `sqlite_kib` of pages a connection.

    A connection to a PostgreSQL that takes longer than `statement_seconds` for a statement is given up.
    """
    parsed = normalise(url)
    if parsed.get_backend_name() != "sqlite":
        return plain_engine(parsed, connect_args={"command_timeout": statement_seconds}, pool_pre_ping=True, **options)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    return plain_engine(parsed, connect_args={"async_creator_fn": partial(SqliteConnection.to, sqlite_kib)}, **options)


class SqliteConnection(aiosqlite.Connection):
    """A connection that ends however it is given up.

    A task that is cancelled twice while it closes a connection tells its thread to stop twice. The thread obeys the
    first, and whoever waited for an answer to the second would wait for ever: the end of the event loop, in the end. A
    connection that comes back when its engine was disposed of is forgotten, and nobody else would close it. And one
    that could not be opened is told to stop without a wait, so that its event loop may be closed before it answers.
    """

    _stopped: asyncio.Future[Any] | None = None

    @classmethod
    def to(cls, kib: int, *arguments: Any, **options: Any) -> SqliteConnection:
        """A connection to be awaited, with `kib` of pages; the other arguments are those of `sqlite3.connect`."""

        def connect() -> sqlite3.Connection:
            connection: sqlite3.Connection = sqlite3.connect(*arguments, **options)
            prepare_sqlite(connection, kib)
            return connection

        connection = cls(connect, iter_chunk_size=64)
        # As SQLAlchemy has it, no process waits for the thread.
        connection._thread = Thread(target=cls._work, args=(connection._tx,), daemon=True)
        return connection

    @staticmethod
    def _work(orders: Any) -> None:
        with suppress(RuntimeError):  # the event loop closed first: nobody waits for this answer, nor for later ones
            _connection_worker_thread(orders)

    def __del__(self) -> None:
        if self._connection is not None:
            self.stop()

    def stop(self) -> asyncio.Future[Any] | None:
        """See `aiosqlite`."""
        if self._running:
            self._stopped = super().stop()
        return self._stopped


def prepare_sqlite(connection: Any, kib: int = WRITER_KIB) -> None:
    """Set up a DBAPI connection to SQLite: a commit survives power loss, and workers wait their turn."""
    cursor = connection.cursor()
    cached = f"cache_size=-{kib}"
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON", cached):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _alembic(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def is_passing(error: DBAPIError) -> bool:
    """Whether the database may well do later what it did not do now, without anybody changing the settings."""
    state, name = getattr(error.orig, "sqlstate", None) or "", getattr(error.orig, "sqlite_errorname", None) or ""
    return error.connection_invalidated or state.startswith(_PASSING_STATES) or name.startswith(_PASSING_NAMES)


def seconds_to_close(engine: AsyncEngine) -> float | None:
    """How long closing may take; SQLite, which has a file to tidy up and nobody to wait for, has all the time."""
    return None if engine.dialect.name == "sqlite" else CLOSE_SECONDS


async def close(engine: AsyncEngine) -> None:
    """Close the engine's connections. PostgreSQL is to agree to each; one that hangs is not waited for."""
    try:
        async with asyncio.timeout(seconds_to_close(engine)):
            await engine.dispose()
    except TimeoutError:
        log.warning("the database does not answer, so its connections are dropped")


async def migrate(engine: AsyncEngine, revision: str = "head") -> None:
    """Bring the schema to `revision`. Safe to call when it is there already. Raises SchemaError for one it cannot."""
    try:
        async with engine.begin() as connection:
            await connection.run_sync(lambda c: command.upgrade(_alembic(c), revision))
    except CommandError as error:
        raise SchemaError(f"the database has a schema that this release does not know: {error}") from error


async def is_migrated(engine: AsyncEngine) -> bool:
    """Whether the database has this release's schema; it is only read."""
    async with engine.connect() as connection:
        return await _revision(connection) == ScriptDirectory.from_config(_alembic()).get_current_head()


async def _revision(connection: AsyncConnection) -> str | None:
    return await connection.run_sync(lambda c: MigrationContext.configure(c).get_current_revision())


async def check_schema(engine: AsyncEngine) -> None:
    """Raise SchemaError, with the command that helps, unless the database has this release's schema or the one before.

    At the one before (0001) everything works but erasure: no user can be erased, and no tombstone is kept.
    """
    async with engine.connect() as connection:
        found = await _revision(connection)
    scripts = ScriptDirectory.from_config(_alembic())
    wanted = scripts.get_current_head()
    if found not in (wanted, scripts.get_revision("head").down_revision):
        raise SchemaError(
            f"the database is at schema {found or 'none'}, this release needs {wanted}; run: python -m service migrate"
        )
