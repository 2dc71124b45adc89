"""Events into the log, and from there to the history cache.

    POST /events ─► one transaction: events + cache_outbox ─► commit ─► cache ─► answer
                                                                        └─► (later) outbox rows deleted

An event is acknowledged after the commit. Its outbox row says "may not have reached the cache" and goes once
it has. A row that stays (the process died between commit and cache, Redis was down) is found by the sweep of
any worker, which drops the user's entry: the next read rebuilds it from the log.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self

from sqlalchemy import delete, insert, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from service.history import HistoryStore, StoredEvent, database_failures_as
from shared import times
from shared.database import cache_outbox, events
from shared.events import HistoryPolicy

log = logging.getLogger(__name__)

FLUSH_SECONDS: Final = 0.2
"""How often the outbox rows of events that reached the cache are deleted."""
SWEEP_SECONDS: Final = 1.0
OVERDUE: Final = 5 * times.SECOND
"""Age at which an outbox row is taken for one whose worker died or could not reach Redis."""
SWEEP_ROWS: Final = 1_000
ATTEMPTS: Final = 3
_DEADLOCKS: Final = ("40P01", "40001")  # PostgreSQL: deadlock detected, serialization failure


class EventConflict(Exception):  # noqa: N818 - says what it is
    """Events whose (user_id, event_id) stands for other content already; nothing was written."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(f"events at {positions} repeat an event_id with other content")
        self.positions = positions


class LogUnavailable(Exception):  # noqa: N818 - says what it is
    """The event log could not be written or read; nothing was acknowledged."""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event, its fields as they were sent."""

    event_id: str | None
    user_id: str
    item_id: str
    event_type: str
    value: float | None = None
    timestamp: int | None = None  # epoch microseconds
    recommendation_id: str | None = None
    session_id: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of one event."""

    event_id: str
    status: Literal["accepted", "duplicate"]


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """A row of the log."""

    seq: int
    event_id: str
    user_id: str
    item_id: str
    event_type: str
    value: float | None
    timestamp: int  # epoch microseconds
    recommendation_id: str | None
    session_id: str | None


_SENT: Final = tuple(NewEvent.__dataclass_fields__)
_LOGGED: Final = tuple(events.c[name] for name in LoggedEvent.__dataclass_fields__)
_STORED: Final = tuple(events.c[name] for name in StoredEvent.__dataclass_fields__)

Identity = tuple[str, str]  # (user_id, event_id)


def digest_of(event: NewEvent) -> str:
    """128 bits in hex over the fields as sent: a timestamp left out stays left out, so its retry is equal."""
    sent = {name: value for name in _SENT if (value := getattr(event, name)) is not None}
    text = json.dumps(sent, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class EventLog:
    """The event log. As an async context manager it also keeps the outbox small and sweeps it."""

    def __init__(self, engine: AsyncEngine, histories: HistoryStore) -> None:
        self.engine, self.histories = engine, histories
        dialect = sqlite if engine.dialect.name == "sqlite" else postgresql
        self._insert = dialect.insert(events).on_conflict_do_nothing().returning(*_STORED, events.c.event_id)
        # SQLite has one writer at a time. Waiting in line here costs a third of polling for its lock.
        on_sqlite = engine.dialect.name == "sqlite"
        self._turn: AbstractAsyncContextManager[Any] = asyncio.Lock() if on_sqlite else nullcontext()
        self._arrived: list[int] = []  # seqs of events that reached the cache
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        with suppress(LogUnavailable):  # the rows stay, and are swept later
            await self.flush()

    async def append(self, events: Sequence[NewEvent], policy: HistoryPolicy, now: int) -> list[Accepted]:
        """Commit all events or none, then bring them to the cache; what became of each, in order.

        `now` (epoch microseconds) is the time of events sent without one. Events without an id get one, and
        are new events whenever they are sent. Raises EventConflict and LogUnavailable; nothing was written then.
        """
        if not events:
            return []
        batch = [_row(event, now) for event in events]
        accepted, duplicates = await self._write(batch)
        # Duplicates too: the first try may have died between its commit and the cache.
        stored = [*accepted.values(), *duplicates]
        if await self.histories.appended(stored, policy):
            self._arrived.extend(event.seq for event in stored)
        results = []
        for row in batch:  # of two equal events in one batch, the first is the new one
            status: Literal["accepted", "duplicate"] = "accepted" if accepted.pop(_identity(row), None) else "duplicate"
            results.append(Accepted(row["event_id"], status))
        return results

    async def history(self, user_id: str, limit: int) -> list[LoggedEvent]:
        """The user's newest `limit` events, oldest first. Raises LogUnavailable."""
        order = (events.c.timestamp.desc(), events.c.seq.desc())
        query = select(*_LOGGED).where(events.c.user_id == user_id).order_by(*order).limit(limit)
        with database_failures_as(LogUnavailable):
            async with self.engine.connect() as connection:
                rows = (await connection.execute(query)).all()
        return [LoggedEvent(*row) for row in reversed(rows)]

    async def settle(self) -> int:
        """Sweep the outbox once: drop the entries of users with overdue events; how many events that repaired.

        While Redis is down the rows stay. Raises LogUnavailable.
        """
        box = cache_outbox.c
        query = select(box.seq, box.user_id).where(box.written <= times.now() - OVERDUE).order_by(box.seq)
        with database_failures_as(LogUnavailable):
            async with self.engine.connect() as connection:
                rows = (await connection.execute(query.limit(SWEEP_ROWS))).all()
        if not rows or not await self.histories.drop(row.user_id for row in rows):
            return 0
        await self._delete([row.seq for row in rows])
        log.info("dropped cached histories that %d events had not reached", len(rows))
        return len(rows)

    async def flush(self) -> None:
        """Delete the outbox rows of all events that have reached the cache. Raises LogUnavailable."""
        arrived, self._arrived = self._arrived, []
        for start in range(0, len(arrived), SWEEP_ROWS):
            await self._delete(arrived[start : start + SWEEP_ROWS])

    async def _delete(self, seqs: Sequence[int]) -> None:
        with database_failures_as(LogUnavailable):
            async with self._turn, self.engine.begin() as connection:
                await connection.execute(delete(cache_outbox).where(cache_outbox.c.seq.in_(seqs)))

    async def _run(self) -> None:
        """Flush and sweep until cancelled; what fails is tried again, for its rows are still there."""
        loop = asyncio.get_running_loop()
        sweep_at = loop.time()
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.histories.drop_dirty()
                await self.flush()
                if loop.time() >= sweep_at:
                    sweep_at = loop.time() + SWEEP_SECONDS
                    await self.settle()
            except LogUnavailable as error:
                log.warning("the outbox cannot be swept now: %s", error)
            except Exception:  # the task must outlive whatever this is
                log.exception("the outbox could not be swept")

    async def _write(self, batch: Sequence[dict[str, Any]]) -> tuple[dict[Identity, StoredEvent], list[StoredEvent]]:
        """Commit the batch: the events that are new, and those the log already had."""
        for attempt in range(1, ATTEMPTS + 1):
            with database_failures_as(LogUnavailable):
                try:
                    async with self._turn, self.engine.begin() as connection:
                        return await self._insert_into(connection, batch)
                except DBAPIError as error:
                    # Two batches that share events in another order can wait for each other.
                    if getattr(error.orig, "sqlstate", None) not in _DEADLOCKS or attempt == ATTEMPTS:
                        raise
        raise AssertionError("unreachable")

    async def _insert_into(
        self, connection: AsyncConnection, batch: Sequence[dict[str, Any]]
    ) -> tuple[dict[Identity, StoredEvent], list[StoredEvent]]:
        rows: dict[Identity, dict[str, Any]] = {}
        for row in batch:
            rows.setdefault(_identity(row), row)
        inserted = (await connection.execute(self._insert, list(rows.values()))).all()
        accepted = {(row.user_id, row.event_id): StoredEvent(*row[:-1]) for row in inserted}
        digests = {identity: row["digest"] for identity, row in rows.items()}
        duplicates = []
        if missing := rows.keys() - accepted.keys():
            query = select(*_STORED, events.c.event_id, events.c.digest)
            query = query.where(tuple_(events.c.user_id, events.c.event_id).in_(sorted(missing)))
            found = (await connection.execute(query)).all()
            if len(found) < len(missing):
                raise LogUnavailable("events were erased while others with their ids were written; try again")
            digests |= {(row.user_id, row.event_id): row.digest for row in found}
            duplicates = [StoredEvent(*row[:-2]) for row in found]
        if clashes := [i for i, row in enumerate(batch) if digests[_identity(row)] != row["digest"]]:
            raise EventConflict(clashes)
        if accepted:
            written = times.now()
            marks = [{"seq": e.seq, "user_id": e.user_id, "written": written} for e in accepted.values()]
            await connection.execute(insert(cache_outbox), marks)
        return accepted, duplicates


def _identity(row: dict[str, Any]) -> Identity:
    return row["user_id"], row["event_id"]


def _row(event: NewEvent, now: int) -> dict[str, Any]:
    """The event as a row of the log, but for its number."""
    return {name: getattr(event, name) for name in _SENT} | {
        "event_id": event.event_id or uuid.uuid4().hex,
        "timestamp": now if event.timestamp is None else event.timestamp,
        "digest": digest_of(event),
    }
