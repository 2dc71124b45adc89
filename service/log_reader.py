"""Reads one user's events from the log, in as few steps as each database allows.

    rows(user_id, as_of)   (seq, item_id, event_type, value, timestamp), oldest first

Every history that is not in the cache comes this way, so while Redis is away all of them do. What fails raises as the
database says it; see `history.database_failures_as`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from shared.database import READER_KIB, prepare_sqlite

_QUERY: Final = """
SELECT seq, item_id, event_type, value, timestamp FROM events
WHERE user_id = {user} AND timestamp <= {as_of} ORDER BY timestamp, seq
"""
_EVER: Final = 2**63 - 1
THREADS: Final = 2
"""Of a worker that read SQLite: one reads pages while the other makes rows."""


class LogReader(Protocol):
    """Reads the log of one database."""

    async def rows(self, user_id: str, as_of: int | None) -> Sequence[Sequence[Any]]:
        """The user's events; with `as_of` (epoch microseconds), those with timestamp <= as_of."""


def reader_for(engine: AsyncEngine) -> LogReader:
    """The reader for the engine's database."""
    return SqliteReader(engine) if engine.dialect.name == "sqlite" else PostgresReader(engine)


class PostgresReader:
    """One statement on a connection of the pool, outside of any transaction: it needs none."""

    _QUERY: Final = _QUERY.format(user="$1", as_of="$2")

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    async def rows(self, user_id: str, as_of: int | None) -> Sequence[Sequence[Any]]:
        """See `LogReader`."""
        async with self.engine.connect() as connection:
            found = await connection.exec_driver_sql(self._QUERY, (user_id, _EVER if as_of is None else as_of))
            return found.all()


class SqliteReader:
    """Runs the whole query on a thread: through the pool each of its steps would be a way to a thread and back."""

    _QUERY: Final = _QUERY.format(user="?", as_of="?")

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")
        self._mine = threading.local()
        self._all: list[sqlite3.Connection] = []
        event.listen(engine.sync_engine, "engine_disposed", lambda _: self._close())

    async def rows(self, user_id: str, as_of: int | None) -> Sequence[Sequence[Any]]:
        """See `LogReader`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._rows, user_id, as_of)

    def _rows(self, user_id: str, as_of: int | None) -> Sequence[Sequence[Any]]:
        try:
            connection: sqlite3.Connection | None = getattr(self._mine, "connection", None)
            if connection is None:
                path = str(self.engine.url.database)
                connection = self._mine.connection = sqlite3.connect(path, check_same_thread=False)
                self._all.append(connection)
                prepare_sqlite(connection, READER_KIB)
            return connection.execute(self._QUERY, (user_id, _EVER if as_of is None else as_of)).fetchall()
        except sqlite3.Error:
            self._forget()  # the next one starts anew, whatever this one has come to
            raise

    def _forget(self) -> None:
        if (connection := getattr(self._mine, "connection", None)) is not None:
            connection.close()
            self._all.remove(connection)
            self._mine.connection = None

    def _close(self) -> None:
        self._threads.shutdown()
        while self._all:
            self._all.pop().close()
        self._mine = threading.local()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="reader")
