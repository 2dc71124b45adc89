"""The transaction that puts events into the log: as few steps as each database allows, for any number of requests.

    write(rows, judge)   insert rows that are new, look up the others, let `judge` refuse, mark the outbox, commit

`judge` sees what became of every row before the commit and may raise, which writes nothing. Whatever fails in the
database before the commit is known to have happened is a `WriteFailed`: the events have identities, so that writing
them again is safe even where the commit went through and only its answer was lost.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache, partial
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.history import StoredEvent
from service.patience import in_transaction
from shared import times
from shared.database import prepare_sqlite
from shared.erasure import pseudonym

T = TypeVar("T")

SECONDS: Final = 5.0
"""A PostgreSQL that takes longer for one transaction is taken for one that does not answer; on SQLite, how long a
worker waits for its turn."""
_CHUNK: Final = 500
"""Rows in one statement on SQLite, which takes some 32,000 parameters."""
_PASSING: Final = ("40P01", "40001", "08")  # PostgreSQL: deadlock, serialization failure, a connection that broke
_MISTAKES: Final = ("22", "23")  # PostgreSQL's classes of errors that lie in the data


class Row(NamedTuple):
    """An event as the log stores it, but for its number; the fields are the columns, in their order."""

    event_id: str
    user_id: str
    item_id: str
    event_type: str
    value: float | None
    timestamp: int  # epoch microseconds
    recommendation_id: str | None
    session_id: str | None
    digest: str

    @property
    def identity(self) -> Identity:
        """What makes it one event, however often it is sent."""
        return self.user_id, self.event_id

    def stored(self, seq: int) -> StoredEvent:
        """The event with its number."""
        return StoredEvent(seq, self.user_id, self.item_id, self.event_type, self.value, self.timestamp)


Identity = tuple[str, str]  # (user_id, event_id)


class Known(NamedTuple):
    """What the log has under an identity."""

    event: StoredEvent
    digest: str
    new: bool  # by this transaction
    erased: int | None = None  # when its user was erased, where that was after the event; epoch microseconds


Log = Mapping[Identity, Known]
Judge = Callable[[Log], None]


class WriteFailed(Exception):  # noqa: N818 - says what it is
    """The database cannot take the transaction now. What is wrong with the rows themselves is raised as it comes."""

    def __init__(self, reason: str, *, passing: bool = False, perhaps_written: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing  # another try at once may well succeed
        self.perhaps_written = perhaps_written  # the connection was lost, with whatever was the last word on it


class Writer(Protocol):
    """Writes to the log of one database, one transaction at a time. `rows` have distinct identities."""

    async def write(self, rows: Sequence[Row], judge: Judge) -> Log:
        """Commit the rows that are new; all rows as the log has them. Raises WriteFailed, and what `judge` raises."""

    async def forget(self, seqs: Sequence[int]) -> None:
        """Delete rows of the outbox. Raises WriteFailed."""


def writer_for(engine: AsyncEngine) -> Writer:
    """The writer for the engine's database."""
    return SqliteWriter(engine) if engine.dialect.name == "sqlite" else PostgresWriter(engine)


_NAMES: Final = ", ".join(Row._fields)
_LOOK_UP: Final = "SELECT seq, user_id, item_id, event_type, value, timestamp, event_id, digest FROM events WHERE "


def _together(
    rows: Sequence[Row],
    seqs: Mapping[Identity, int],
    found: Sequence[Sequence[object]],
    erased: Mapping[Identity, int],
) -> Log:
    """All rows as the log has them: new ones under the number they got, the others as they were looked up."""
    known = {}
    for row in rows:
        if seq := seqs.get(identity := row.identity):
            known[identity] = Known(row.stored(seq), row.digest, True)
    for *fields, event_id, digest in found:
        stored = StoredEvent(*fields)  # type: ignore[arg-type]
        known[stored.user_id, str(event_id)] = Known(stored, str(digest), False)
    for identity, at in erased.items():
        known[identity] = known[identity]._replace(erased=at)
    if len(known) < len(rows):
        raise WriteFailed("events were erased while others with their ids were written", passing=True)
    return known


# --- what was erased ----------------------------------------------------------------------------------


class Question(Enum):
    """What `Refusals` asks of the database that it is used on; `{values}` and `{names}` are that database's words."""

    READY = "SELECT 1 WHERE 'erasure_key' IN ({names})"
    KEY = "SELECT key FROM erasure_key"
    USERS = "SELECT user_hash, erased_at FROM erasures WHERE user_hash IN ({values})"
    EVENTS = "SELECT event_hash FROM erased_events WHERE event_hash IN ({values})"


Ask = Callable[[Question, list[str]], list[tuple[Any, ...]]]


class Refusals:
    """Which events must not be written, because their user was erased since."""

    def __init__(self) -> None:
        self._key: bytes | None = None

    def among(self, ask: Ask, rows: Sequence[Row]) -> dict[Identity, int]:
        """(user, event) -> when the user was erased, of each row that is refused.

        `ask` asks in the writing transaction, after its insert: before that an erasure may still be under way.
        """
        if self._key is None:
            if not ask(Question.READY, []):
                return {}  # schema 0001
            self._key = bytes.fromhex(ask(Question.KEY, [])[0][0])
        key = self._key
        users = {pseudonym(key, user): user for user in {row.user_id for row in rows}}
        erased = {users[hashed]: int(at) for hashed, at in ask(Question.USERS, list(users))}
        if not erased:
            return {}
        of_erased = [row for row in rows if row.user_id in erased]
        hashes = [pseudonym(key, *row.identity) for row in of_erased]
        gone = {hashed for (hashed,) in ask(Question.EVENTS, hashes)}
        return {
            row.identity: erased[row.user_id]
            for row, hashed in zip(of_erased, hashes, strict=True)
            if row.timestamp <= erased[row.user_id] or hashed in gone
        }


# --- PostgreSQL ---------------------------------------------------------------------------------------

_TYPES: Final = ("text", "text", "text", "text", "float8", "int8", "text", "text", "text")
_UNNEST: Final = ", ".join(f"${place}::{kind}[]" for place, kind in enumerate(_TYPES, 1))
# Arrays: one statement, prepared once, for any number of rows. Numbers are drawn in the order of the sort.
_INSERT_ALL: Final = f"""
WITH sent AS (SELECT * FROM unnest({_UNNEST}) WITH ORDINALITY AS sent({_NAMES}, place)),
     new AS (INSERT INTO events ({_NAMES}) SELECT {_NAMES} FROM sent ORDER BY place
             ON CONFLICT DO NOTHING RETURNING seq, user_id, event_id),
     box AS (INSERT INTO cache_outbox (seq, user_id, written) SELECT seq, user_id, ${len(_TYPES) + 1} FROM new)
SELECT user_id, event_id, seq FROM new
"""  # noqa: S608 - made of constants
_FIND_ALL: Final = _LOOK_UP + "(user_id, event_id) IN (SELECT * FROM unnest($1::text[], $2::text[]))"  # noqa: S608
_FORGET_ALL: Final = "DELETE FROM cache_outbox WHERE seq = ANY($1::int8[])"


def _ask_postgresql(connection: Connection, question: Question, values: list[str]) -> list[tuple[Any, ...]]:
    """Ask one of the questions of `Refusals`."""
    query = question.value.replace("{names}", "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
    query = query.replace("{values}", "SELECT unnest($1::text[])")
    return [tuple(row) for row in connection.exec_driver_sql(query, (values,) if "$1" in query else ())]


class PostgresWriter:
    """Takes a connection of the pool for each transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._refusals = Refusals()

    async def write(self, rows: Sequence[Row], judge: Judge) -> Log:
        """See `Writer`."""

        async def write(connection: AsyncConnection) -> Log:
            columns = [list(column) for column in zip(*rows, strict=True)]
            inserted = await connection.exec_driver_sql(_INSERT_ALL, (*columns, times.now()))
            seqs: dict[Identity, int] = {(row.user_id, row.event_id): row.seq for row in inserted}
            missing = [row.identity for row in rows if row.identity not in seqs] if len(seqs) < len(rows) else []
            wanted = [user_id for user_id, _ in missing], [event_id for _, event_id in missing]
            found = (await connection.exec_driver_sql(_FIND_ALL, wanted)).all() if missing else []
            erased = await connection.run_sync(lambda c: self._refusals.among(partial(_ask_postgresql, c), rows))
            known = _together(rows, seqs, found, erased)
            judge(known)
            return known

        return await self._transaction(write)

    async def forget(self, seqs: Sequence[int]) -> None:
        """See `Writer`."""
        await self._transaction(lambda connection: connection.exec_driver_sql(_FORGET_ALL, (list(seqs),)))

    async def _transaction(self, act: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        try:
            return await in_transaction(self.engine, SECONDS, act)
        except DBAPIError as error:
            state, lost = getattr(error.orig, "sqlstate", None) or "", error.connection_invalidated
            if state.startswith(_MISTAKES):
                raise
            raise WriteFailed(
                _reason(error), passing=lost or state.startswith(_PASSING), perhaps_written=lost
            ) from error
        except TimeoutError as error:
            raise WriteFailed(f"no answer within {SECONDS:.0f} s", perhaps_written=True) from error
        except (SQLAlchemyError, OSError) as error:  # no connection, or none free
            raise WriteFailed(_reason(error)) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


# --- SQLite -------------------------------------------------------------------------------------------


def _ask_sqlite(connection: sqlite3.Connection, question: Question, values: list[str]) -> list[tuple[Any, ...]]:
    """Ask one of the questions of `Refusals`."""
    query = question.value.replace("{names}", "SELECT name FROM sqlite_master")
    query = query.replace("{values}", "SELECT value FROM json_each(?)")
    return connection.execute(query, (json.dumps(values),) if "?" in query else ()).fetchall()


class Turn:
    """The turn among processes that write to one SQLite file: whoever came first goes first.

    SQLite has those who wait look again after ever longer pauses, while who has just written goes on at once: two
    workers under load would keep each other waiting for seconds. Here the first in line holds its place (byte 0 of a
    file of locks) until it has the turn (byte 1), and who has written joins the line behind it. Others than workers
    need not take a turn: the file itself has the last word.
    """

    PAUSE: Final = 0.0005
    """Seconds between two looks: little beside a commit. A system call that waits could not be given up."""

    def __init__(self, database: str) -> None:
        self._file = os.open(f"{database}-turn", os.O_RDWR | os.O_CREAT, 0o644)

    @contextmanager
    def taken(self, seconds: float) -> Iterator[None]:
        """Hold the turn while the block runs. Raises TimeoutError after so many seconds in line."""
        deadline = time.monotonic() + seconds
        self._lock(0, deadline)
        try:
            self._lock(1, deadline)
        finally:
            self._unlock(0)
        try:
            yield
        finally:
            self._unlock(1)

    def _lock(self, byte: int, deadline: float) -> None:
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError("others write to the database all the time") from error
            else:
                return
            time.sleep(self.PAUSE)

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)

    def close(self) -> None:
        """Close the file, which is kept."""
        os.close(self._file)


class SqliteWriter:
    """Runs each transaction in one go on a thread of its own: other processes wait for the file meanwhile."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self._refusals = Refusals()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._connection: sqlite3.Connection | None = None
        self._turn: Turn | None = None
        event.listen(engine.sync_engine, "engine_disposed", lambda _: self._thread.submit(self._close).result())

    async def write(self, rows: Sequence[Row], judge: Judge) -> Log:
        """See `Writer`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._write, rows, judge)

    async def forget(self, seqs: Sequence[int]) -> None:
        """See `Writer`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._forget, seqs)

    def _write(self, rows: Sequence[Row], judge: Judge) -> Log:
        with self._transaction() as connection:
            # Numbers are given here, so that no row has to be asked for its own; AUTOINCREMENT goes on from them.
            last = connection.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'events'").fetchone()[0] or 0
            inserted = 0
            for start in range(0, len(rows), _CHUNK):
                chunk = rows[start : start + _CHUNK]
                values = [v for seq, row in enumerate(chunk, last + start + 1) for v in (seq, *row)]
                inserted += connection.execute(_insert(len(chunk)), values).rowcount
            seqs = {row.identity: seq for seq, row in enumerate(rows, last + 1)}
            found = self._found(connection, rows, seqs) if inserted < len(rows) else []
            erased = self._refusals.among(partial(_ask_sqlite, connection), rows)
            known = _together(rows, seqs, found, erased)
            judge(known)
            mark = "INSERT INTO cache_outbox (seq, user_id, written) SELECT seq, user_id, ? FROM events WHERE seq > ?"
            connection.execute(mark, (times.now(), last))
        return known

    @staticmethod
    def _found(connection: sqlite3.Connection, rows: Sequence[Row], seqs: dict[Identity, int]) -> list[tuple[Any, ...]]:
        """What the log has under these identities already; the numbers meant for them are dropped from `seqs`."""
        wanted = json.dumps([row.identity for row in rows])
        pairs = "(SELECT value ->> 0, value ->> 1 FROM json_each(?))"
        found = connection.execute(f"{_LOOK_UP} (user_id, event_id) IN {pairs}", (wanted,)).fetchall()
        former = [row for row in found if row[0] != seqs[row[1], row[6]]]
        for row in former:
            del seqs[row[1], row[6]]
        return former

    def _forget(self, seqs: Sequence[int]) -> None:
        with self._transaction() as connection:
            wanted = json.dumps(list(seqs))
            connection.execute("DELETE FROM cache_outbox WHERE seq IN (SELECT value FROM json_each(?))", (wanted,))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = self._connection = self._connection or self._connect()
            self._turn = self._turn or Turn(str(self.engine.url.database))
            with self._turn.taken(SECONDS):
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self._close()  # which rolls back; the next transaction starts anew, whatever this one has come to
            if isinstance(error, sqlite3.IntegrityError | sqlite3.DataError):
                raise
            raise WriteFailed(_reason(error)) from error
        except BaseException:
            if self._connection is not None:
                self._connection.execute("ROLLBACK")
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(str(self.engine.url.database), isolation_level=None, cached_statements=256)
        prepare_sqlite(connection)
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._turn is not None:
            self._turn.close()
            self._turn = None


@lru_cache(maxsize=_CHUNK)
def _insert(count: int) -> str:
    """One statement for `count` rows: with a call for each row, the thread would fight for the GIL each time."""
    place = f"({', '.join('?' * (len(Row._fields) + 1))})"
    values = ", ".join([place] * count)
    return f"INSERT INTO events (seq, {_NAMES}) VALUES {values} ON CONFLICT (user_id, event_id) DO NOTHING"  # noqa: S608
