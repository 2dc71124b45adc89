"""Erasing a user: the events, the cached history, and what keeps both from coming back.

    one transaction: writers waited for ─► outbox rows ─► events deleted ─► tombstone ─► commit ─► cache entry dropped
                                               └─► (after 5 s and after 60 s, by any worker) dropped again, row deleted

An event that was committed just before may reach the cache just after, from a worker that stood still between the two
even later. The second drop takes it away again, and the third what came to an entry that was made anew meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Table, delete, insert, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.history import HistoryStore, database_failures_as
from service.patience import in_transaction, with_connection
from shared import times
from shared.database import LATE, cache_outbox, erased_events, erasures, events
from shared.erasure import has_erasure, pseudonym, read_key

RETRIES: Final = times.DAY
"""How old an event may be whose retry, sent without a time, is still known after its user was erased."""
_CHUNK: Final = 1_000


class ErasureUnavailable(Exception):  # noqa: N818 - says what it is
    """The database cannot be reached or is busy; perhaps nothing was erased. Asking again is safe."""


class ErasureUnknown(Exception):  # noqa: N818 - says what it is
    """The database is at a schema without erasure."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was done."""

    events: int
    erased_at: int  # epoch microseconds


SECONDS: Final = 10.0
"""A database that takes longer for an erasure is taken for one that does not answer; asking again is safe."""


class Eraser:
    """Erases users."""

    def __init__(self, engine: AsyncEngine, histories: HistoryStore) -> None:
        self.engine, self.histories = engine, histories
        self._dialect = sqlite if engine.dialect.name == "sqlite" else postgresql

    async def erase(self, user_id: str) -> Erasure:
        """Erase all events of the user; again, those that came since. Raises ErasureUnavailable, ErasureUnknown."""
        try:
            with database_failures_as(ErasureUnavailable, self.histories.failed):
                if not await with_connection(self.engine, SECONDS, has_erasure):
                    raise ErasureUnknown
                # Another transaction: SQLite's cannot write after it has read what somebody else changes meanwhile.
                done = await in_transaction(self.engine, SECONDS, lambda connection: self._erase(connection, user_id))
        finally:  # also where the commit's answer did not come
            await self.histories.drop([user_id])  # if Redis is down, this process and the sweep of the outbox see to it
        return done

    async def _erase(self, connection: AsyncConnection, user_id: str) -> Erasure:
        await self._wait_for_writers(connection)
        await connection.execute(delete(cache_outbox).where(cache_outbox.c.user_id == user_id))
        # Below zero: no event has such a number, and no worker takes the row for one that reached the cache. The time
        # is taken behind the first statement, which may have waited for SQLite's other writers.
        written, number = times.now(), -1 - secrets.randbelow(2**53)
        marks = [{"seq": seq, "user_id": user_id, "written": written} for seq in (number, LATE + number)]
        await connection.execute(insert(cache_outbox), marks)
        gone = delete(events).where(events.c.user_id == user_id).returning(events.c.event_id, events.c.timestamp)
        rows = (await connection.execute(gone)).all()
        now, key = times.now(), await read_key(connection)
        erased_at = max([now, *(row.timestamp for row in rows)])  # clocks differ by seconds
        mark = {"user_hash": pseudonym(key, user_id), "erased_at": erased_at}
        await self._keep_later(connection, erasures, [mark])
        fresh = [row.event_id for row in rows if row.timestamp >= now - RETRIES]
        traces = [{"event_hash": pseudonym(key, user_id, event), "erased_at": now} for event in fresh]
        await connection.execute(delete(erased_events).where(erased_events.c.erased_at < now - RETRIES))
        await self._keep_later(connection, erased_events, traces)
        return Erasure(len(rows), erased_at)

    async def _wait_for_writers(self, connection: AsyncConnection) -> None:
        """From here to the commit nobody else inserts events. Whoever does so next sees the tombstone."""
        if self._dialect is postgresql:
            await connection.execute(text("SET LOCAL lock_timeout = '2s'"))
            await connection.execute(text("LOCK TABLE events IN SHARE ROW EXCLUSIVE MODE"))
        # SQLite has one writer at a time: the delete that comes next makes it us, up to the commit.

    async def _keep_later(self, connection: AsyncConnection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
        upsert = self._dialect.insert(table)
        upsert = upsert.on_conflict_do_update(
            index_elements=list(table.primary_key),
            set_={"erased_at": upsert.excluded.erased_at},
            where=table.c.erased_at < upsert.excluded.erased_at,
        )
        for start in range(0, len(rows), _CHUNK):
            await connection.execute(upsert, list(rows[start : start + _CHUNK]))
